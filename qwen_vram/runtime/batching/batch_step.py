"""Decode step of a batch: one token of each request, captured for some batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_vram.arithmetic.batching import step_rows
from qwen_vram.errors import BackendUnavailableError
from qwen_vram.runtime.attention.decode_step import scratch_elements
from qwen_vram.runtime.decoding.capture_stream import give_stream, on_stream, take_stream
from qwen_vram.runtime.decoding.layer import (
    Place,
    decode_end,
    decode_layer,
    fused_decode_end,
    fused_decode_layer,
)
from qwen_vram.runtime.kernels.fused_layers import FusedLayer
from qwen_vram.runtime.kv_cache.paged import PagePool
from qwen_vram.runtime.memory.workspaces import take_workspace
from qwen_vram.runtime.offload.host_embedding import HostEmbedding
from qwen_vram.spec.batching.pages import PAGE, pages_of

# Columns of the state before the page numbers.
_TOKEN, _FILLED, _PAGES = 0, 1, 2


class Row(NamedTuple):
    """One request of a step.

    Attributes:
        token: The newest token, which the step feeds.
        filled: The number of its keys with the new one.
        pages: Its pages.
    """

    token: int
    filled: int
    pages: Sequence[int]


class BatchStep:
    """Decode step of at most `most` requests. All batch sizes share the state, the logits and the graphs' memory.

    Args:
        most: The most requests.
        pool: The pages.
        captured: Capture the steps as CUDA graphs, which needs a GPU.

    Attributes:
        logits: Logits of the newest step in float32, (most, vocab_size).
        sizes: The batch sizes that run; a smaller batch has unused rows.

    Raises:
        BackendUnavailableError: the kernels that captured steps need do not run here.
    """

    def __init__(self, model: Any, most: int, pool: PagePool, *, captured: bool) -> None:
        self.model, self.pool = model, pool
        self.sizes = step_rows(most)
        fused = isinstance(model.model.layers[0], FusedLayer)
        self._layer, self._end = (fused_decode_layer, fused_decode_end) if fused else (decode_layer, decode_end)

        def state(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self._width = _PAGES + pages_of(pool.context_len)
        self._state = state(most, self._width, dtype=torch.int32)
        pinned = model.device.type == "cuda"
        self._host = torch.zeros(most, self._width, dtype=torch.int32, pin_memory=pinned)
        self.logits = state(most, model.config.vocab_size, dtype=torch.float32)
        # The likeliest token of each row, and 1 if its logits are finite.
        self._chosen = state(most, 2, dtype=torch.int64)
        table = model.get_input_embeddings()
        self._table = table if isinstance(table, HostEmbedding) else None
        width = model.config.hidden_size
        self._embedded = None if self._table is None else state(most, width, dtype=model.dtype)
        elements = [scratch_elements(model, size, pages_of(pool.context_len) * PAGE) for size in self.sizes]
        self._scratch = state(max(elements), dtype=torch.float32) if min(elements) else None
        if captured and self._scratch is None:
            raise BackendUnavailableError(
                "Triton cannot compile this library's kernels here, which concurrent requests on a GPU need, or "
                "kernels='fused' is not set; load without concurrency",
                backend="triton",
            )
        self._unused = torch.zeros(1, dtype=torch.int32, device=model.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None
        if captured:
            self._capture()

    def __call__(self, rows: Sequence[Row]) -> list[tuple[int, bool]]:
        """Feed the newest token of each request; return its likeliest next token, and if its logits are finite.

        `logits` has those of request i in row i until the next step.
        """
        size = next(one for one in self.sizes if one >= len(rows))
        host = self._host[:size]
        host.zero_()
        host[:, _FILLED] = 1
        for number, row in enumerate(rows):
            values = torch.tensor([row.token, row.filled, *row.pages], dtype=torch.int32)
            host[number, : len(values)] = values
        self._state[:size].copy_(host, non_blocking=True)
        if self._table is not None and self._embedded is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._embedded[:size].copy_(self._table(self._state[:size, _TOKEN].long()))
        graph = self._graphs.get(size)
        if graph is None:
            self._compute(size)
        else:
            graph.replay()
        return [(token, bool(finite)) for token, finite in self._chosen[: len(rows)].tolist()]

    def close(self) -> None:
        """Release the graphs, the model and the stream."""
        self._graphs.clear()
        self.model = self.pool = None  # type: ignore[assignment]
        if self._stream is not None:
            give_stream(self._stream)
            self._stream = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, size: int) -> None:
        """Run a step of `size` rows from the state."""
        model, state = self.model.model, self._state[:size]
        tokens, filled = state[:, _TOKEN].contiguous(), state[:, _FILLED].contiguous()
        pages = state[:, _PAGES:]
        last = filled.long() - 1
        hidden = model.embed_tokens(tokens) if self._embedded is None else self._embedded[:size]
        cos, sin = model.rotary_emb(hidden[:, None], last[:, None])
        page = pages.gather(1, (last // PAGE)[:, None])[:, 0].long()
        slots = page * PAGE + last % PAGE
        place = Place(cos, sin, slots, filled, self._starts(filled), filled, self._scratch, self._unused, pages)
        for layer, (keys, values) in zip(model.layers, self.pool.layers, strict=True):
            hidden = self._layer(layer, hidden, keys, values, place)
        logits = self._end(self.model, hidden)
        self.logits[:size].copy_(logits)
        highest, token = logits.max(dim=-1)
        self._chosen[:size, 0] = token
        self._chosen[:size, 1] = (highest - highest) == 0  # NaN for NaN and infinities

    def _starts(self, filled: Tensor) -> Tensor:
        """Return zeros: in its own pages each sequence begins at key 0."""
        return torch.zeros_like(filled)

    def _capture(self) -> None:
        """Capture a graph for each size, the largest first, whose memory the others use too."""
        device = self.model.device
        self._stream = take_stream(device)
        pool = torch.cuda.graph_pool_handle()
        with on_stream(self._stream):
            take_workspace(device, of_sums=True)
        for size in reversed(self.sizes):
            self._host.zero_()
            self._host[:, _FILLED] = 1
            self._state.copy_(self._host)
            with on_stream(self._stream):
                self._compute(size)
                self._compute(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self._compute(size)
            self._graphs[size] = graph
        torch.cuda.empty_cache()
