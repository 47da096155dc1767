"""The compiler of GPU kernels on this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from shutil import which


def missing_compiler() -> str:
    """Return the part that is missing to compile kernels; empty if nothing is missing."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    if not any(which(name) for name in compilers if name):
        return "a C compiler"
    return "Triton" if find_spec("triton") is None else ""
