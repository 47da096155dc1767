"""The CPU of this machine, as Linux describes it in /proc and /sys."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path

_FILE = "/proc/cpuinfo"
_NODES = "/sys/devices/system/node"
# The first processor's entry is within this many bytes. A machine can have hundreds of processors.
_FIRST = 8_192
# The instructions of bitsandbytes' kernel. Source: bitsandbytes 0.50.2, csrc/cpu_ops.cpp, has_avx512bf16.
_FOUR_BIT = "avx512_bf16"


def cpu_name() -> str:
    """Return the CPU's name if the system tells it, and its architecture otherwise."""
    return _entries().get("model name") or platform.machine() or "CPU"


def has_4bit_kernel() -> bool:
    """Tell if bitsandbytes has a kernel for products with 4-bit weights on this CPU, or may have one."""
    flags = _entries().get("flags")
    return flags is None if sys.platform != "linux" else _FOUR_BIT in (flags or "").split()


def numa_nodes() -> int:
    """Return the number of NUMA nodes; 1 if the system does not tell it."""
    return max(1, len(list(Path(_NODES).glob("node[0-9]*"))))


@cache
def _entries() -> dict[str, str]:
    """Return the entries of the first processor; empty if there is no such file."""
    try:
        with open(_FILE, encoding="utf-8", errors="replace") as file:
            lines = file.read(_FIRST).partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
