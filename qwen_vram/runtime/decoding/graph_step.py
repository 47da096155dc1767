"""The decode step: one token of every sequence, captured as a CUDA graph.

The graph contains the whole step with its state: it also advances the positions in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_vram.runtime.decoding.graph_cache import GraphBuffers
from qwen_vram.runtime.decoding.layer import Place
from qwen_vram.runtime.offload.host_embedding import HostEmbedding

Functions = tuple[Callable[..., Tensor], Callable[..., Tensor]]


class Step:
    """One decode step for the first `batch_size` sequences of buffers. The host never waits for it."""

    def __init__(
        self, model: Any, functions: Functions, buffers: GraphBuffers, batch_size: int, *, dynamic: bool
    ) -> None:
        self.model = model
        self.layer, self.end = functions
        self.max_length = buffers.max_length
        self.memory = [
            (keys[:batch_size].flatten(0, 1), values[:batch_size].flatten(0, 1)) for keys, values in buffers.layers
        ]
        if dynamic:  # the same code serves buffers of other lengths
            for pair in self.memory:
                for one in pair:
                    torch._dynamo.mark_dynamic(one, 0)

        def state(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.tokens, self.positions, self.slots = state(batch_size), state(batch_size, 1), state(batch_size)
        self.filled = state(batch_size, dtype=torch.int32)
        self.starts = state(batch_size + 1, dtype=torch.int32)
        self.rows = torch.arange(batch_size + 1, dtype=torch.int32, device=model.device)
        self.logits = state(batch_size, model.config.vocab_size, dtype=torch.float32)
        # Rows of embeddings on the host are gathered before a replay.
        table, width = model.get_input_embeddings(), model.config.hidden_size
        self.table = table if isinstance(table, HostEmbedding) else None
        self.embedded = None if self.table is None else state(batch_size, width, dtype=model.dtype)
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, length: int, padding: Tensor, positions: Tensor) -> None:
        """Set the state: the buffers hold `length` tokens of each sequence.

        Args:
            padding: The number of padding tokens at the front of each sequence, (batch,).
            positions: The next tokens' positions, (batch, 1).
        """
        batch = len(self.tokens)
        firsts = torch.arange(batch + 1, device=self.slots.device) * self.max_length
        self.slots.copy_(firsts[:-1] + length)
        self.starts.copy_(firsts)
        self.starts[:-1] += padding
        self.filled.copy_(length + 1 - padding)
        self.positions.copy_(positions)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Feed a token of each sequence, (batch,); return logits (batch, vocab_size), valid until the next step."""
        self.tokens.copy_(tokens)
        self.embed()
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def embed(self) -> None:
        """Gather the rows of the tokens from embeddings on the host."""
        if self.table is not None and self.embedded is not None:
            self.embedded.copy_(self.table(self.tokens))

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self) -> None:
        """Run the operations that are captured."""
        model = self.model.model
        hidden = model.embed_tokens(self.tokens) if self.embedded is None else self.embedded
        cos, sin = model.rotary_emb(hidden[:, None], self.positions)
        place = Place(cos, sin, self.slots, self.rows, self.starts, self.filled)
        for layer, (keys, values) in zip(model.layers, self.memory, strict=True):
            hidden = self.layer(layer, hidden, keys, values, place)
        self.logits.copy_(self.end(self.model, hidden))
        for counter in (self.positions, self.slots, self.filled):
            counter.add_(1)

    def rehearse(self) -> None:
        """Run the step at the last, free position of the buffers, which compiles code that is not compiled yet."""
        self.begin(
            self.max_length - 1, torch.full_like(self.slots, self.max_length - 1), torch.zeros_like(self.positions)
        )
        self.run()

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Capture the graph, with its temporary tensors in `pool`, on a `stream` that has rehearsed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.run()
        self.graph = graph
