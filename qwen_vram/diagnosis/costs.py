"""Costs of a setting for one model and workload, by this library's arithmetic."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.checkpoints.machine_file import current
from qwen_vram.diagnosis.finding import LEAST_SHARE
from qwen_vram.diagnosis.machine_facts import MachineFacts
from qwen_vram.diagnosis.model_facts import ModelFacts
from qwen_vram.errors import QwenVramError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import KNOBS, Profile
from qwen_vram.spec.workload import Workload

# Families whose attention is counted, by the sizes that a dense decoder has too.
_STAND_IN = "qwen3"


class Subject:
    """A model on a machine with a workload: the object that a check examines.

    Attributes:
        model: The model's facts.
        machine: The machine's facts.
        workload: The lengths of the generation that costs are for.
    """

    def __init__(self, model: ModelFacts, machine: MachineFacts, workload: Workload) -> None:
        self.model = model
        self.machine = machine
        self.workload = workload
        self._known: dict[tuple[tuple[str, object], ...], Estimate] = {}

    @cached_property
    def architecture(self) -> Architecture:
        """The model's architecture; a dense decoder with the same attention if its family is not counted."""
        try:
            return Architecture.from_config(dict(self.model.config))
        except QwenVramError:
            return Architecture.from_config(_dense(self.model))

    @property
    def rows(self) -> int:
        """Token vectors of the largest forward pass: those of the prompt, or of one chunk."""
        tokens = self.workload.prompt_len
        return self.workload.batch_size * min(tokens, self.model.generation.chunk or tokens)

    @cached_property
    def knobs(self) -> dict[str, Any]:
        """The knobs of a profile that describe the model's settings."""
        generation, profile = self.model.generation, self.model.profile
        if profile is not None:
            return {name: getattr(profile, name) for name in KNOBS}
        named = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash_attention_2"}
        fixed = "static" in generation.cache
        return {
            "weights": self.model.weights_format,
            "attention": named.get(self.model.attention, "fused"),
            "cache": "static" if fixed else "dynamic",
            "prefill_chunk_size": generation.chunk,
        }

    def estimate(self, *, padded: bool | None = None, **knobs: object) -> Estimate:
        """Return the estimate of the model's settings with some knobs replaced."""
        lengths = self.workload
        if padded is not None and padded != lengths.padded:
            lengths = Workload(
                prompt_len=lengths.prompt_len,
                max_new_tokens=lengths.max_new_tokens,
                batch_size=lengths.batch_size,
                padded=padded,
            )
        chosen = {**self.knobs, **knobs}
        key = (("padded", lengths.padded), *sorted(chosen.items()))
        if key not in self._known:
            profile = Profile(**chosen)
            self._known[key] = estimate(
                self.model.label, self.architecture, profile, lengths, machine=current(), session=False
            )
        return self._known[key]

    def beside_weights(self, *, padded: bool | None = None, **knobs: object) -> int:
        """Bytes of keys, values and activations at the peak; on a GPU with the allocator's rounding."""
        found = self.estimate(padded=padded, **knobs)
        if self.model.on_gpu:
            return found.peak_allocated - found.weights
        return found.kv_cache + found.tensors

    def saved(self, before: dict[str, object], after: dict[str, object]) -> int:
        """Bytes that the peak loses if some knobs change from `before` to `after`; 0 if it grows."""
        now = self.beside_weights(**before)  # type: ignore[arg-type]
        return max(0, now - self.beside_weights(**after))  # type: ignore[arg-type]

    @cached_property
    def own(self) -> int:
        """Bytes that the model takes as it is set: its weights on the device, and the rest of its peak."""
        return self.model.resident_bytes + self.beside_weights()

    @property
    def memory(self) -> int:
        """Bytes of the devices that compute: of the first GPUs, or of the host."""
        if self.model.on_gpu and self.machine.gpus:
            return sum(card.total for card in self.machine.gpus[: self.model.gpus])
        return self.machine.ram_total

    @property
    def free(self) -> int:
        """Bytes of that device which the model may take; those that a loaded model has taken count as free."""
        if self.model.on_gpu and self.machine.gpus:
            return sum(card.free + card.used_here for card in self.machine.gpus[: self.model.gpus])
        taken = self.model.resident_bytes if self.model.is_live else 0
        return self.machine.ram_available + taken

    def matters(self, nbytes: int) -> bool:
        """Tell if a cost is large enough to report for a setting that nobody wants: a share of the model's bytes."""
        return nbytes >= LEAST_SHARE * self.own

    def is_worth(self, nbytes: int) -> bool:
        """Tell if memory is worth a change that has a price: the same share of the device's memory too."""
        return self.matters(nbytes) and nbytes >= LEAST_SHARE * self.memory


def _dense(model: ModelFacts) -> dict[str, object]:
    """The configuration of a dense decoder with a model's attention, for families that are not counted."""
    experts = model.number("num_experts_per_tok") * model.number("moe_intermediate_size")
    layers = max(1, model.layers - model.linear_layers)
    return {
        "model_type": _STAND_IN,
        "hidden_size": model.number("hidden_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": experts or model.number("intermediate_size") or 4 * model.number("hidden_size"),
        "vocab_size": model.number("vocab_size"),
        "max_position_embeddings": model.number("max_position_embeddings", 2**20),
        "tie_word_embeddings": bool(model.config.get("tie_word_embeddings", False)),
    }
