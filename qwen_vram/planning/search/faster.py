"""Search for a faster profile with the same formats of weights and KV cache.

The search turns knobs from a small to a large cost in time, and stops at the first profile that fits. The remaining
memory may be enough to undo some of these changes, or to capture decode steps.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.planning.search.decode_graph import obstacle
from qwen_vram.planning.search.savers import Saver
from qwen_vram.spec.profile import Profile

_CAPTURE = Saver({"captured": True}, "nothing lost: decode steps are replayed as CUDA graphs")
_TABLE = Saver({"embeddings": "device"}, "nothing lost: the token table is on the GPU")
_WHOLE = Saver({"dequantization": None}, "nothing lost: matrices are dequantized whole, which is faster")
_CHUNKS = (None, 4096, 2048, 1024)
# Layers that stream in exchange for captured steps.
_MORE = (1, 2)


def given_back(start: Profile, found: Profile, knobs: dict[str, object]) -> Iterator[Saver]:
    """Yield moves that make `found` faster and take memory, the most effective first. A move need not fit.

    Args:
        start: The profile that the search began with.
        knobs: The knobs that the caller set; they stay.
    """
    if "captured" not in knobs and "compiled" not in knobs and not found.captures and obstacle(found) is None:
        yield _CAPTURE
        if found.streamed_layers and "streamed_layers" not in knobs:
            for more in _MORE:  # in the memory of these layers
                yield _CAPTURE._replace(knobs={"captured": True, "streamed_layers": found.streamed_layers + more})
    if found.embeddings != start.embeddings:
        yield _TABLE
    if found.dequantization != start.dequantization:
        yield _WHOLE
    for chunk in _CHUNKS:
        if _is_larger(chunk, found.prefill_chunk_size) and not _is_larger(chunk, start.prefill_chunk_size):
            yield Saver({"prefill_chunk_size": chunk}, "nothing lost: the prompt is fed in fewer chunks")


def _is_larger(chunk: int | None, other: int | None) -> bool:
    """Tell if a chunk has more tokens than another one; `None` is the whole prompt."""
    return other is not None and (chunk is None or chunk > other)
