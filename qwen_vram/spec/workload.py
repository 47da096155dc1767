"""The workload: the number of sequences and the lengths of one generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwen_vram.errors import UnknownNameError, WorkloadError
from qwen_vram.spec.architecture import Architecture

Logits = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One generation: `batch_size` sequences of `prompt_len` tokens, each continued by `max_new_tokens`.

    The defaults are the article's test.

    Attributes:
        logits: `"last"`: logits of the last position, as `generate` makes them. `"all"`: one plain forward pass without
            a cache that makes logits for every position of the prompt.
        padded: The batch has padding, so that attention needs a mask.
    """

    prompt_len: int = 512
    max_new_tokens: int = 512
    batch_size: int = 1
    logits: Logits = "last"
    padded: bool = False

    def __post_init__(self) -> None:
        """Refuse lengths that are not positive whole numbers."""
        for name in ("prompt_len", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WorkloadError(f"{name} must be a positive whole number, got {value!r}", name=name, got=value)
        if self.logits not in get_args(Logits):
            raise UnknownNameError("logits", self.logits, get_args(Logits))
        if not isinstance(self.padded, bool):
            raise UnknownNameError("padded", self.padded, ("True", "False"))

    @property
    def context_len(self) -> int:
        """Tokens of one sequence at the end: prompt and new ones."""
        return self.prompt_len + self.max_new_tokens

    def check(self, architecture: Architecture) -> None:
        """Refuse a context that exceeds the model's positions.

        Raises:
            WorkloadError: `context_len` exceeds `max_position_embeddings`.
        """
        limit = architecture.max_position_embeddings
        if self.context_len > limit:
            rope = architecture.rope
            advice = "shorten one of them" if rope is None else rope.advice(self.context_len)
            raise WorkloadError(
                f"prompt_len {self.prompt_len} + max_new_tokens {self.max_new_tokens} = {self.context_len} tokens are "
                f"past the model's max_position_embeddings {limit}; {advice}",
                name="context_len",
                got=self.context_len,
            )


# The article's 65-25-10 split is right for this workload on a card of 24 GB (10**9). Live at once are 15.23 GB of bf16
# weights, keys and values for 102,400 tokens (5.87 GB), and one prefill step of 16,384 tokens (2.34 GB).
FULL_CARD_WORKLOAD: dict[str, object] = {
    "prompt_len": 24_576,
    "max_new_tokens": 1_024,
    "batch_size": 4,
    "prefill_chunk_size": 4_096,
    "cache": "preallocated",
    "attention": "fused",
}
