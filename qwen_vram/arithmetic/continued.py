"""Prefill after a filled cache: the largest piece of tokens that a plan covers."""

from __future__ import annotations

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.replay.live_bytes import chunk_bytes, moments
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


def largest_piece(known: Estimate, profile: Profile, workload: Workload, *, held: int, covered: Workload) -> int:
    """Return the number of new tokens to feed at once after `held` tokens of a prompt; 0 if no number is covered.

    A step after a filled cache can need tensors that a prefill from the start does not need. `attention="sdpa"` then
    builds a mask, and copies keys and values for each query head. The live bytes of such steps are compared with the
    most live bytes of `covered`, on each device. The chunk size is halved until they are not more.

    Args:
        known: The estimate of the plan, with the part of each device.
        profile: The profile of this generation.
        workload: The generation, with its whole prompt.
        covered: A workload whose memory is counted.
    """
    new = workload.prompt_len - held
    piece = min(profile.prefill_chunk_size or new, new)
    while piece and not all(
        _needs_no_more(part, profile, workload, held, piece, covered) for part in known.devices.values() or (known,)
    ):
        piece //= 2
    return piece


def _needs_no_more(
    part: Estimate, profile: Profile, workload: Workload, held: int, piece: int, covered: Workload
) -> bool:
    """Tell if the steps of a piece on one device need at most the live bytes of the covered workload."""
    assert part.architecture is not None
    own = part.profile.replace(prefill_chunk_size=profile.prefill_chunk_size)
    most = max(moment.total for moment in moments(part.architecture, own, covered))
    full, rest = divmod(workload.prompt_len - held, piece)
    steps = [(piece, held + (full - 1) * piece), *([(rest, workload.prompt_len - rest)] if rest else [])]
    needed = (chunk_bytes(part.architecture, own, workload, queries=queries, past=past) for queries, past in steps)
    return all(sum(one) <= most for one in needed)
