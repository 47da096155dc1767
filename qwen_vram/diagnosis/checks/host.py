"""Checks of the host: locked memory, swap, and the limits of a Windows subsystem."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes
from qwen_vram.units import format_bytes


def check_memlock(subject: Subject) -> Iterator[Finding]:
    """Find a limit of locked memory that is lower than the weights which have to be pinned."""
    machine, model = subject.machine, subject.model
    if machine.memlock is None or not machine.gpus:
        return
    pinned = model.offload.host or max(0, subject.own - machine.gpus[0].total)
    pinned = min(pinned, model.weight_bytes)
    cost = pinned - machine.memlock
    if cost > 0:
        yield of_bytes(
            "memlock",
            cost,
            of=pinned,
            found=f"a process may lock {format_bytes(machine.memlock)}, and {format_bytes(pinned)} of layers stay in "
            "host memory",
            cost="may not be pinned, and are then copied at the rate of unpinned memory",
            fix="ulimit -l unlimited, or for a container: docker run --ulimit memlock=-1",
        )


def check_swapped(subject: Subject) -> Iterator[Finding]:
    """Find memory of this process that is swapped out."""
    swapped = subject.machine.swapped
    if swapped and subject.matters(swapped):
        yield of_bytes(
            "swapped",
            swapped,
            of=subject.own,
            found="a part of this process is swapped out to a disk",
            cost="are read back from the disk on their next use",
            fix="end other processes, or use a smaller format: qv.load(model, weights='nf4')",
        )


def check_wsl(subject: Subject) -> Iterator[Finding]:
    """Find the Windows Subsystem for Linux without memory for the model.

    Its virtual machine has half of the memory by default.
    Source: https://learn.microsoft.com/windows/wsl/wsl-config, `memory`.
    """
    machine = subject.machine
    if machine.is_wsl and machine.ram_available < subject.model.weight_bytes:
        yield of_bytes(
            "wsl-memory",
            machine.ram_total,
            of=machine.ram_total,
            found=f"WSL has {format_bytes(machine.ram_total)}, of which {format_bytes(machine.ram_available)} are "
            f"available, and the weights are {format_bytes(subject.model.weight_bytes)}",
            cost="more stay with Windows, by the default of one half",
            fix="set memory under [wsl2] in .wslconfig, then run: wsl --shutdown",
        )


CHECKS = (check_memlock, check_swapped, check_wsl)
