"""Memory of captured decode steps beside the KV cache."""

from __future__ import annotations

from qwen_vram.arithmetic.replay.linear import CUBLAS_WORKSPACE
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency
from qwen_vram.spec.workload import Workload

_INT64 = 8
_INT32 = 4
_FP32 = 4


def step_sizes(architecture: Architecture, profile: Profile, workload: Workload) -> tuple[int, ...]:
    """Bytes of each tensor that a captured decode step keeps, in the order in which they are taken; none otherwise.

    For each sequence its token, position, place in the cache and number of keys, where its keys start, its row, and its
    logits in float32; with the table on the host, its token's row too. cuBLAS takes a workspace for every stream; the
    step is captured on one of its own.
    """
    if not profile.captures or workload.logits == "all":
        return ()
    batch = workload.batch_size
    state = (batch * _INT64,) * 3 + (batch * _INT32, *((batch + 1) * _INT32,) * 2)
    row = (
        (batch * architecture.hidden_size * profile.element_bytes,)
        if residency(architecture, profile).table_on_host
        else ()
    )
    return (*state, batch * architecture.vocab_size * _FP32, *row, *CUBLAS_WORKSPACE)
