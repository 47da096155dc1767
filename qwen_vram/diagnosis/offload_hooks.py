"""Weights that accelerate's hooks keep off the device, and the time of these hooks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.diagnosis.model_facts import Offload

# Bytes of modules whose hooks are run to measure them.
_MEASURED = 2**28


def offload_of(model: nn.Module) -> Offload:
    """Return the bytes that hooks move for each forward pass, and the measured time of some hooks."""
    host = disk = pinned = 0
    for module, hook in _hooks(model):
        for name, tensor in _weights(module, hook):
            held = _held(hook, name)
            if held is None:
                disk += tensor.numel() * tensor.element_size()
            else:
                host += held.nbytes
                pinned += held.nbytes if held.is_pinned() else 0
    if not host + disk:
        return Offload()
    ms, measured = _measure(model)
    return Offload(host=host, disk=disk, pinned=pinned, hook_ms=ms, measured=measured)


def _hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield every module with its hook that offloads weights."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
                yield module, one


def _weights(module: nn.Module, hook: Any) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=bool(getattr(hook, "place_submodules", False)))


def _held(hook: Any, name: str) -> Tensor | None:
    """The tensor in host memory; `None` if it is in a file. Nothing is read."""
    found: Any = hook.weights_map
    while hasattr(found, "prefix"):
        name, found = f"{found.prefix}{name}", found.dataset
    found = getattr(found, "state_dict", found)
    held = found.get(name) if isinstance(found, Mapping) else None
    return held if isinstance(held, Tensor) else None


def _measure(model: nn.Module) -> tuple[float, int]:
    """Milliseconds of some hooks as in a forward pass, and the bytes of their modules."""
    total, elapsed = 0, 0.0
    for module, hook in _hooks(model):
        if getattr(module, "training", False):
            continue
        nbytes = sum(one.numel() * one.element_size() for _, one in _weights(module, hook))
        start = time.perf_counter()
        with torch.no_grad():
            hook.pre_forward(module)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
            hook.post_forward(module, None)
        elapsed += time.perf_counter() - start
        total += nbytes
        if total >= _MEASURED:
            break
    return elapsed * 1000, total
