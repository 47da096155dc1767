"""The decode step: one token of every sequence, captured as CUDA graphs.

Without streamed layers one graph contains the whole step with its state: it also advances the positions in the cache.
Streamed layers are launched one by one, because they wait for their copies. Each run of layers between them is a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen_vram.runtime.attention.decode_step import scratch_elements
from qwen_vram.runtime.decoding.graph_cache import GraphBuffers
from qwen_vram.runtime.decoding.layer import Place
from qwen_vram.runtime.kv_cache.quantized import QuantizedStates
from qwen_vram.runtime.offload.host_embedding import HostEmbedding
from qwen_vram.runtime.offload.streamer import Streamer

Functions = tuple[Callable[..., Tensor], Callable[..., Tensor]]


class Part(NamedTuple):
    """Consecutive layers of a step, from `first` to before `end`: resident ones, or one that streams."""

    first: int
    end: int
    streams: bool


def parts_of(layers: Sequence[nn.Module], streamer: Streamer | None) -> Iterator[Part]:
    """Yield the parts of a step in order. The first and the last are resident, possibly without a layer."""
    first = 0
    for number, layer in enumerate(layers):
        if streamer is not None and streamer.streams(layer):
            if first < number or not number:
                yield Part(first, number, streams=False)
            yield Part(number, number + 1, streams=True)
            first = number + 1
    yield Part(first, len(layers), streams=False)


def _first(states: Tensor | QuantizedStates, batch_size: int) -> Any:
    """Return the first sequences of a layer's keys or values, as `layer.attend` takes them."""
    if isinstance(states, QuantizedStates):
        return states.first(batch_size)
    return states[:batch_size].flatten(0, 1)


class Step:
    """One decode step for the first `batch_size` sequences of buffers. The host never waits for it."""

    def __init__(
        self,
        model: Any,
        functions: Functions,
        buffers: GraphBuffers,
        batch_size: int,
        *,
        dynamic: bool,
        streamer: Streamer | None = None,
    ) -> None:
        self.model = model
        self.streamer = streamer
        self.parts = tuple(parts_of(model.model.layers, streamer))
        self.layer, self.end = functions
        self.max_length = buffers.max_length
        self.memory = [tuple(_first(states, batch_size) for states in pair) for pair in buffers.layers]
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
        # Between parts.
        self.hidden = None if len(self.parts) == 1 else state(batch_size, width, dtype=model.dtype)
        scratch = 0 if dynamic else scratch_elements(model, batch_size, buffers.max_length, buffers.kv_cache)
        self.scratch = state(scratch, dtype=torch.float32) if scratch else None
        self.quantized, self._codes = state(1, dtype=torch.int32), 0
        if buffers.is_quantized and not scratch and model.device.type == "cuda":
            raise RuntimeError(f"attention over a cache in {buffers.kv_cache} needs this library's Triton kernels")
        self.place: Place | None = None
        # One of each resident part, in order, once they are captured.
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def begin(self, length: int, padding: Tensor, positions: Tensor, quantized: int = 0) -> None:
        """Set the state: the buffers hold `length` tokens of each sequence, of which `quantized` are codes.

        Args:
            padding: The number of padding tokens at the front of each sequence, (batch,).
            positions: The next tokens' positions, (batch, 1).
        """
        self._set_codes(quantized)
        batch = len(self.tokens)
        firsts = torch.arange(batch + 1, device=self.slots.device) * self.max_length
        self.slots.copy_(firsts[:-1] + length)
        self.starts.copy_(firsts)
        self.starts[:-1] += padding
        self.filled.copy_(length + 1 - padding)
        self.positions.copy_(positions)

    def __call__(self, tokens: Tensor, quantized: int = 0) -> Tensor:
        """Feed a token of each sequence, (batch,); return logits (batch, vocab_size), valid until the next step.

        Args:
            quantized: Number of tokens in the buffers that are codes.
        """
        if quantized != self._codes:
            self._set_codes(quantized)
        self.tokens.copy_(tokens)
        self.embed()
        self.run()
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
        """Run the step's parts: replay the graphs of resident ones, if they are captured."""
        graphs = iter(self.graphs)
        for part in self.parts:
            if part.streams:
                self._stream(part)
            elif self.graphs:
                next(graphs).replay()
            else:
                self._compute(part)

    def rehearse(self) -> None:
        """Run the resident parts at the last, free position of the buffers, which compiles code."""
        self.begin(
            self.max_length - 1, torch.full_like(self.slots, self.max_length - 1), torch.zeros_like(self.positions)
        )
        self._each_resident(self._compute)

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Capture the graphs, with their temporary tensors in `pool`, on a `stream` that has rehearsed."""
        graphs = []

        def capture(part: Part) -> None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._compute(part)
            graphs.append(graph)

        self._each_resident(capture)
        self.graphs = graphs

    @torch.inference_mode(False)
    @torch.no_grad()
    def _each_resident(self, call: Callable[[Part], None]) -> None:
        for part in self.parts:
            if not part.streams:
                call(part)

    def _compute(self, part: Part) -> None:
        """Run a part of resident layers; with the first part the embedding, with the last one the model's end."""
        model = self.model.model
        if part.first == 0:
            hidden = model.embed_tokens(self.tokens) if self.embedded is None else self.embedded
            cos, sin = model.rotary_emb(hidden[:, None], self.positions)
            lengths = self.slots, self.rows, self.starts, self.filled
            self.place = Place(cos, sin, *lengths, self.scratch, self.quantized)
        else:
            assert self.hidden is not None
            hidden = self.hidden
        for number in range(part.first, part.end):
            hidden = self.layer(model.layers[number], hidden, *self.memory[number], self.place)
        if part is not self.parts[-1]:
            assert self.hidden is not None
            self.hidden.copy_(hidden)
            return
        self.logits.copy_(self.end(self.model, hidden))
        for counter in (self.positions, self.slots, self.filled):
            counter.add_(1)

    def _set_codes(self, quantized: int) -> None:
        self._codes = quantized
        self.quantized.fill_(quantized)

    def _stream(self, part: Part) -> None:
        """Run a layer that streams."""
        assert self.streamer is not None
        assert self.hidden is not None
        layer = self.model.model.layers[part.first]

        def compute(hidden: Tensor) -> Tensor:
            return self.layer(layer, hidden, *self.memory[part.first], self.place)

        self.hidden.copy_(self.streamer.run(layer, compute, self.hidden))
