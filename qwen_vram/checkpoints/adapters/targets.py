"""Modules that an adapter's settings name, found by the rules of PEFT."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The modules with low-rank factors. Source: peft 0.21.2, tuners/tuners_utils.py, check_target_module_exists.

    Attributes:
        modules: Ends of paths, one regular expression for the whole path, or `"all-linear"`; `None` if only the tensors
            show the modules.
        excluded: Ends of paths, or one regular expression, of modules that are left out.
        saved: Expressions for modules that are trained whole, and so have no factors.
        layers: Numbers of the only layers with factors; empty for all. Without effect beside a regular expression.
        layers_pattern: Names of the list of layers; empty for any.
        weights: Ends of paths of modules whose weights are named as parameters (target_parameters), in addition to the
            other settings. Source: peft 0.21.2, tuners/tuners_utils.py, _inject_parameters.
    """

    modules: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str = ()
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    def name(self, module: str, *, linear: bool) -> bool:
        """Tell if the settings name `module`, a path; a `linear` module is a matrix, but not embeddings or head."""
        if self.name_weight(module):
            return True
        if self.excluded and _matches(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.saved):
            return False
        modules = self.modules or ()
        if modules == "all-linear":
            return linear
        if isinstance(modules, str) or module in modules:
            return _matches(modules, module)
        return _matches(modules, module) and (not self.layers or self._layer_of(module) in self.layers)

    def name_weight(self, module: str) -> bool:
        """Tell if the settings name the weight of `module` as a parameter."""
        return _matches(self.weights, module)

    def _layer_of(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if match:
                return int(match[match.lastindex or 0])
        return None


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    """Tell if `module` is one of the paths or ends in one, or if the regular expression matches all of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)
