"""Memory of batched requests: tensors of their decode steps and prompts."""

from __future__ import annotations

from qwen_vram.arithmetic.attention import decode_scratch
from qwen_vram.arithmetic.replay.linear import CUBLAS_WORKSPACE
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.batching.pages import PAGE, pages_of
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency
from qwen_vram.spec.workload import Workload

_INT64 = 8
_INT32 = 4
_FP32 = 4
# Up to this number of rows the captured sizes double; above, this number is added.
_DOUBLED = 64
# The most requests whose sampling is computed together, so that its tensors are few.
DRAWN_TOGETHER = 8

# Prompts that one forward pass feeds together, at most, and the tokens of such a pass if the plan sets no chunk size.
PACKED = 16
_PACKED_TOKENS = 4096


def packed_tokens(profile: Profile, workload: Workload) -> int:
    """Return the most prompt tokens of a forward pass over pages: of a chunk, or of whole prompts together."""
    most = profile.prefill_chunk_size or max(workload.prompt_len, _PACKED_TOKENS)
    return min(most, workload.prompt_len * min(workload.batch_size, PACKED))


def step_rows(most: int) -> tuple[int, ...]:
    """Return the batch sizes whose decode steps are captured, up to `most` requests.

    >>> step_rows(6), step_rows(40)
    ((1, 2, 4, 6), (1, 2, 4, 8, 16, 32, 40))
    """
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size = size * 2 if size < _DOUBLED else size + _DOUBLED
    return (*sizes, most)


def batch_step_sizes(architecture: Architecture, profile: Profile, workload: Workload) -> tuple[int, ...]:
    """Bytes of each tensor that the decode steps of a batch keep, in the order of allocation.

    Each request has its token, its number of keys and its pages; logits in float32; and its next token with a flag. If
    the token embeddings are on the host, it has its token's row. Attention's kernel keeps the results of parts of the
    keys. Captured steps take a workspace of cuBLAS for their stream.
    """
    most, pages = workload.batch_size, pages_of(workload.context_len)
    state = most * (2 + pages) * _INT32, most * architecture.vocab_size * _FP32, most * 2 * _INT64
    on_host = residency(architecture, profile).table_on_host
    rows = (most * architecture.hidden_size * profile.element_bytes,) * on_host
    if not profile.captures:
        return (*state, *rows)
    scratch = max(
        decode_scratch(rows, heads.heads, heads.key_value_heads, heads.head_dim, pages * PAGE)
        for rows in step_rows(most)
        for heads in (layer.attention for layer, _ in architecture.kinds)
    )
    return (*state, *rows, scratch * _FP32, _INT32, *CUBLAS_WORKSPACE)


def sampling_sizes(architecture: Architecture) -> tuple[int, ...]:
    """Bytes of the tensors that sampling with `top_k` and `top_p` has at once, for the requests drawn together.

    Scores in float32 before and after a processor, sorted scores with their places, their shares and running sum, and
    two masks.
    Source: transformers 5.17 and 5.23, generation/logits_process.py, `TopPLogitsWarper`.
    """
    scores = DRAWN_TOGETHER * architecture.vocab_size
    return (*(scores * _FP32,) * 5, scores * _INT64, scores, scores)
