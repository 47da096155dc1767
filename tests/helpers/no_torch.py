"""A pytest plugin, `-p tests.helpers.no_torch`: what needs torch is as if it were not installed."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

BLOCKED = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "peft", "numpy", "triton")


class PathFinder(importlib.machinery.PathFinder):
    """Finds no blocked module."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec; `None` if it is blocked, as for a module that is not installed."""
        return None if fullname.partition(".")[0] in BLOCKED else super().find_spec(fullname, path, target)


loaded = sorted(set(BLOCKED) & sys.modules.keys())
assert not loaded, f"{loaded} imported before tests.helpers.no_torch"
sys.meta_path[:] = [PathFinder if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
