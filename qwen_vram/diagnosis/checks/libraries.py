"""Checks of library versions that are known to cost memory or time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from qwen_vram.checkpoints.machine_file import current
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes, of_ms
from qwen_vram.dtypes import BF16
from qwen_vram.units import format_bytes


class Known(NamedTuple):
    """Versions of a package that are known to cost memory.

    Attributes:
        package: Its name.
        since, below: The first version with the fault, and the first one without.
        fault: The fault in words.
        cost: Bytes that it costs; 0 if it does not concern the model.
        of_what: The origin of the bytes.
        fix: The change that removes it.
    """

    package: str
    since: tuple[int, ...]
    below: tuple[int, ...]
    fault: str
    cost: Callable[[Subject], int]
    of_what: str
    fix: str


def _conv3d(subject: Subject) -> int:
    """Bytes by the report of the fault: a peak of 12.7 in place of 6.3 GB."""
    return 6_400_000_000 if subject.model.has_conv3d and subject.model.on_gpu else 0


def _dequantized(subject: Subject) -> int:
    """Bytes of the largest 4-bit matrix in 16 bits, for steps of several rows."""
    coded = [one.numel * BF16.nbytes for one in subject.model.matrices if one.codes]
    return max(coded, default=0) if subject.workload.batch_size > 1 and subject.model.on_gpu else 0


KNOWN = (
    # Source: https://github.com/pytorch/pytorch/issues/166643 and 177406.
    Known(
        "torch",
        (2, 9),
        (2, 10),
        "3-D convolutions in 16 bits do not run on cuDNN",
        _conv3d,
        "more at the peak, as reported in pytorch issue 177406",
        'pip install "torch>=2.10"',
    ),
    # Source: bitsandbytes 0.50.0, pull request 1949: a fused 4-bit product for 2 to 64 rows.
    Known(
        "bitsandbytes",
        (0,),
        (0, 50),
        "a decode step of several sequences dequantizes each 4-bit matrix",
        _dequantized,
        "for the largest matrix in 16 bits, in each decode step",
        'pip install "bitsandbytes>=0.50"',
    ),
)


def check_versions(subject: Subject) -> Iterator[Finding]:
    """Find installed versions with a known fault that concerns the model."""
    for row in KNOWN:
        release = subject.machine.release(row.package)
        if release is None or not row.since <= release < row.below:
            continue
        cost = row.cost(subject)
        if cost:
            yield of_bytes(
                f"version-{row.package}",
                cost,
                of=subject.own,
                found=f"{row.package} {subject.machine.versions[row.package]}: {row.fault}",
                cost=row.of_what,
                fix=row.fix,
            )


def check_cpu_build(subject: Subject) -> Iterator[Finding]:
    """Find a build of torch for the CPU beside a GPU: models then run on the CPU without a message."""
    machine, weights = subject.machine, subject.model.weight_bytes
    version = machine.versions.get("torch", "")
    if not machine.gpus or not version.endswith("+cpu") or not machine.host_rate:
        return
    ms = (weights / machine.host_rate - weights / current().device_bandwidth) * 1000
    if ms > 0:
        yield of_ms(
            "torch-cpu-build",
            ms,
            found=f"torch {version} is a build for the CPU, beside {machine.gpus[0].name}",
            cost=f"for each token to read {format_bytes(weights)} of weights at {machine.host_rate / 1e9:.1f} GB/s",
            fix="pip install --force-reinstall torch, from an index of CUDA builds (pytorch.org/get-started)",
        )


CHECKS = (check_versions,)
