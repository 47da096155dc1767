"""The device map for `transformers`, and hooks between GPUs only.

`transformers`' own hooks for a second device would copy all token embeddings and every offloaded parameter, one by one,
each time that a module runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.backends.base import Backend, Request

# Loggers whose warnings about missing modules are wrong here: these modules are added afterwards.
_MISTAKEN = ("accelerate.big_modeling", "transformers.integrations.bitsandbytes")


def device_map(chosen: Plan, device: torch.device) -> dict[str, int | str | torch.device]:
    """Return `device` for all modules, except embeddings on the host and modules on "meta" that are built afterwards.

    Those modules are streamed layers, and with them a head to quantize, which `transformers` would first copy to the
    device in 16 bits. Over several GPUs the result is the plan's own map, and no layer streams.
    """
    if chosen.estimate.devices:
        return dict(chosen.device_map)
    on_host = chosen.placement.embeddings == "cpu" and device.type != "cpu"
    streamed = chosen.residency.streamed
    if not on_host and not streamed:
        return {"": "cpu" if device.type == "cpu" else device.index}
    # "cpu" as a text would be a second device, on which bitsandbytes' quantizer does not quantize matrices.
    here = device if device.type == "cpu" else device.index
    where: dict[str, int | str | torch.device] = dict.fromkeys(chosen.device_map, here)
    if on_host:
        where["model.embed_tokens"] = "cpu"
    architecture = chosen.estimate.architecture
    assert architecture is not None
    # Layers on "disk" stay torch's own, to be quantized. On "meta" they become bitsandbytes', for stored codes.
    away = "disk" if architecture.stored_format is None else "meta"
    for number in streamed:
        del where[f"model.layers.{number}"]
        # By their children: in transformers 5.17 "model.layers.1" also matches the beginning of layer 12.
        where |= {f"model.layers.{number}.{child}": away for child in architecture.layers[number].children}
    if chosen.residency.late_head:
        where["lm_head"] = where["model.embed_tokens"] if architecture.tie_word_embeddings else "disk"
    return where


def left_out(chosen: Plan) -> dict[str, tuple[int, ...]]:
    """Return the parameters of streamed layers, with their shapes in the model, if they are stored quantized.

    They are hidden from `transformers`, which would unpack them and write them to the disk again.
    """
    architecture = chosen.estimate.architecture
    assert architecture is not None
    if architecture.stored_format is None:
        return {}
    return {
        f"model.layers.{number}.{weight.name}": weight.shape
        for number in chosen.residency.streamed
        for weight in architecture.layers[number].weights
    }


def undispatched(backend: Backend, request: Request) -> Any:
    """Return the model that `backend` loads, as if all modules were on the request's device."""
    if len(request.device_map) == 1:
        return backend.load(request)
    from accelerate.hooks import remove_hook_from_submodules

    with _quietly():
        model: Any = backend.load(request)
    remove_hook_from_submodules(model)
    for module in model.modules():
        # accelerate leaves the bound method in the module, which would hide the forward of a replacing class.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    del model.hf_device_map
    return model


def connect(model: Any, chosen: Plan, first: torch.device) -> None:
    """Add accelerate's hooks between GPUs: every layer gets its inputs, and `generate` the logits on the first GPU.

    It is called last, because a hook keeps the forward that it finds.
    """
    from accelerate import dispatch_model

    where = {name: first.index if place == "cpu" else place for name, place in chosen.device_map.items()}
    dispatch_model(model, where, main_device=first.index, skip_keys=model._skip_keys_device_placement)


@contextmanager
def _quietly() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _MISTAKEN]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
