"""Memory of captured decode steps beside the KV cache."""

from __future__ import annotations

from qwen_vram.arithmetic.attention import decode_scratch
from qwen_vram.arithmetic.batching import batch_step_sizes
from qwen_vram.arithmetic.replay.linear import CUBLAS_WORKSPACE
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency
from qwen_vram.spec.workload import Workload

_INT64 = 8
_INT32 = 4
_FP32 = 4
_FP16 = 2


def step_sizes(architecture: Architecture, profile: Profile, workload: Workload) -> tuple[int, ...]:
    """Bytes of each tensor that a captured decode step keeps, in the order of allocation; empty without capture.

    Each sequence has its token, position, place in the cache, number of keys, start of its keys, row, and logits in
    float32. If the token embeddings are on the host, it also has its token's row, and if layers stream, the hidden
    states between them. Fused attention keeps the results of parts of the keys. cuBLAS takes a workspace for every
    stream, and the step is captured on a separate one.
    """
    if workload.logits == "all":
        return ()
    if profile.cache == "paged":
        return batch_step_sizes(architecture, profile, workload)
    if not profile.captures:
        return ()
    batch = workload.batch_size
    state = (batch * _INT64,) * 3 + (batch * _INT32, *((batch + 1) * _INT32,) * 2)
    homes = residency(architecture, profile)
    rows = (batch * architecture.hidden_size * profile.element_bytes,) * (homes.table_on_host + bool(homes.streamed))
    scratch = _scratch_bytes(architecture, profile, workload)
    return (*state, batch * architecture.vocab_size * _FP32, *rows, *scratch, *CUBLAS_WORKSPACE)


def _scratch_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> tuple[int, ...]:
    """Bytes for the parts of attention in this library's kernels; empty if they do not run."""
    if profile.compiled or profile.kernels != "fused" or profile.element_bytes != _FP16:
        return ()
    return (
        _FP32
        * max(
            decode_scratch(
                workload.batch_size,
                layer.attention.heads,
                layer.attention.key_value_heads,
                layer.attention.head_dim,
                workload.context_len,
            )
            for layer, _ in architecture.kinds
        ),
    )
