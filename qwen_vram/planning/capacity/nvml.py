"""NVML: the GPUs that CUDA shows, and questions that a driver may not answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def driver() -> Iterator[ModuleType | None]:
    """NVML while it is open; `None` without the library or a driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def told(pynvml: ModuleType | None, ask: str, *about: object) -> Any:
    """The answer of an NVML function; `None` if this library, driver or card does not give it (WSL, containers)."""
    function = getattr(pynvml, ask, None)
    if pynvml is None or function is None:
        return None
    try:
        return function(*about)
    except (pynvml.NVMLError, ValueError):  # some drivers report an unknown UUID as an invalid argument
        return None


def visible_handles(pynvml: ModuleType) -> list[object]:
    """The handles of the GPUs that CUDA shows, by the rules of `CUDA_VISIBLE_DEVICES`.

    CUDA ignores an entry that is not valid, and all later ones. It shows no GPU if one is named twice.
    Source: CUDA C++ Programming Guide 13.0, environment variables; torch 2.13, torch/cuda/__init__.py.
    """
    count = told(pynvml, "nvmlDeviceGetCount") or 0
    cards = [card for card in (told(pynvml, "nvmlDeviceGetHandleByIndex", n) for n in range(count)) if card is not None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        shown = [_shown(pynvml, card) for card in cards]
        return [handle for handle in shown if handle is not None]
    chosen: dict[str, object] = {}
    for entry in visible.split(","):
        key, handle = _named(pynvml, cards, entry.strip())
        if handle is None:
            break
        if key in chosen:
            return []
        chosen[key] = handle
    return list(chosen.values())


def _named(pynvml: ModuleType, cards: list[object], entry: str) -> tuple[str, object | None]:
    """A key and the handle of the GPU that an entry of `CUDA_VISIBLE_DEVICES` names; `None` if it names no GPU."""
    number = re.match(r"\+?\d+", entry)  # CUDA reads "1gpu" as 1
    if number:
        index = int(number.group())
        return str(index), _shown(pynvml, cards[index]) if index < len(cards) else None
    if entry.startswith("MIG-"):
        parts = {key: part for index, card in enumerate(cards) for key, part in _instances(pynvml, card, str(index))}
        near = [key for key, part in parts.items() if entry in (key, _legacy(pynvml, cards, key, part))]
        near = near or [key for key, part in parts.items() if uuid_of(pynvml, part).startswith(entry)]
        return (near[0], parts[near[0]]) if len(near) == 1 else ("", None)
    if entry.startswith("GPU-"):
        full = [index for index, card in enumerate(cards) if uuid_of(pynvml, card).startswith(entry)]
        return (str(full[0]), _shown(pynvml, cards[full[0]])) if len(full) == 1 else ("", None)
    return "", None


def _shown(pynvml: ModuleType, card: object) -> object | None:
    """The handle that CUDA shows for a GPU: its own, or its first instance's if it is divided (MIG)."""
    mode = told(pynvml, "nvmlDeviceGetMigMode", card)
    if not mode or mode[0] != 1:
        return card
    return next((part for _, part in _instances(pynvml, card, "")), None)


def _instances(pynvml: ModuleType, card: object, key: str) -> Iterator[tuple[str, object]]:
    """The MIG instances of a GPU, each with a key that begins with the GPU's."""
    for number in range(told(pynvml, "nvmlDeviceGetMaxMigDeviceCount", card) or 0):
        part = told(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", card, number)
        if part is not None:
            yield f"{key}:{number}", part


def _legacy(pynvml: ModuleType, cards: list[object], key: str, part: object) -> str:
    """An instance's name in drivers before 470: `MIG-GPU-<UUID>/<GPU instance>/<compute instance>`."""
    card = uuid_of(pynvml, cards[int(key.partition(":")[0])])
    numbers = (told(pynvml, f"nvmlDeviceGet{kind}InstanceId", part) for kind in ("Gpu", "Compute"))
    return "/".join([f"MIG-{card}", *map(str, numbers)])


def uuid_of(pynvml: ModuleType, handle: object) -> str:
    """Return the UUID of a GPU or MIG instance; empty if the driver does not tell."""
    return text_of(told(pynvml, "nvmlDeviceGetUUID", handle))


def text_of(told: str | bytes | None) -> str:
    """Return an answer of NVML as text: old versions give bytes."""
    return told.decode() if isinstance(told, bytes) else told or ""
