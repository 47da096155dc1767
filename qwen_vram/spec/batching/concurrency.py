"""`concurrency=N`: the knobs and the batch of a plan whose requests run together."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_vram.errors import WorkloadError

# Knobs of steps over pages on a GPU, and those of a plan on the CPU.
_ON_GPU: dict[str, object] = {"attention": "fused", "kernels": "fused", "captured": True}
_PAGED: dict[str, object] = {"cache": "paged"}


def concurrent(concurrency: int | None, batch_size: int, knobs: Mapping[str, object]) -> tuple[int, dict[str, object]]:
    """Return the sequences and the knobs of a workload with `concurrency` requests at once; `None` changes nothing.

    Raises:
        WorkloadError: the number is not positive, or a batch or another cache is asked for too.
    """
    if concurrency is None:
        return batch_size, dict(knobs)
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise WorkloadError(
            f"concurrency must be None or a positive whole number of requests, got {concurrency!r}",
            name="concurrency",
            got=concurrency,
        )
    if batch_size != 1:
        raise WorkloadError(
            f"concurrency {concurrency} and batch_size {batch_size} are both given; each request is one sequence, so "
            "leave batch_size out",
            name="batch_size",
            got=batch_size,
        )
    cache = knobs.get("cache", "paged")
    if cache != "paged":
        raise WorkloadError(
            f"concurrency {concurrency} needs cache='paged', got cache={cache!r}; leave cache out",
            name="cache",
            got=cache,
        )
    return concurrency, {**_PAGED, **knobs}


def paged_knobs(profile: object, knobs: Mapping[str, object], *, on_gpu: bool) -> dict[str, object]:
    """Return knobs with those that steps over pages need on a GPU, if `knobs` have pages and leave them open.

    Args:
        profile: The name of a profile, or a `Profile`, whose own knobs stay as they are.

    Raises:
        WorkloadError: `captured` is false.
    """
    if knobs.get("cache") != "paged" or not on_gpu or not isinstance(profile, str):
        return dict(knobs)
    if knobs.get("captured") is False:
        raise WorkloadError(
            "concurrent requests (cache='paged') on a GPU need captured=True; set it, or leave it out",
            name="captured",
            got=False,
        )
    return {**_ON_GPU, **knobs}
