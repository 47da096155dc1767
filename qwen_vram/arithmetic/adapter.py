"""A LoRA adapter beside a quantized or plain base: its tensors, from its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.errors import CheckpointError, NotSupportedError
from qwen_vram.files.header import read_header
from qwen_vram.files.hub import hub_snapshot
from qwen_vram.files.local import is_folder, parse_config

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT saves the base's own table and head beside an adapter of them, and loads them over the base's.
BASE_LAYER = ".base_layer."


def adapter_folder(adapter: str | Path) -> Path:
    """The local folder of an adapter, downloaded where it is a hub id.

    Raises:
        CheckpointError: it is neither a folder nor a hub id.
        HubError: the hub does not give it.
    """
    if not isinstance(adapter, (str, Path)):
        raise CheckpointError(f"an adapter is a folder or a hub id, got {adapter!r}", path=repr(adapter))
    folder = Path(adapter)
    return folder if is_folder(folder) or folder.is_absolute() else hub_snapshot(str(adapter))


def adapter_tensors(folder: Path) -> tuple[Weight, ...]:
    """Every tensor of an adapter's file, by the name that the base's module has.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    tensors = read_header(folder / WEIGHTS)
    return tuple(Weight(name.removeprefix(_PREFIX), tensor.shape, "adapter") for name, tensor in tensors.items())


def with_adapter(architecture: Architecture, adapter: str | Path) -> Architecture:
    """`architecture` with an adapter's tensors beside its own.

    Raises:
        CheckpointError: the adapter's files are missing or broken, or belong to another model.
        NotSupportedError: another kind than LoRA, or DoRA, whose forward is not counted.
    """
    folder = adapter_folder(adapter)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"no {CONFIG} in {str(folder)!r}; point to an adapter that PEFT saved", path=str(folder))
    config = parse_config((folder / CONFIG).read_text(encoding="utf-8"), source=str(folder / CONFIG))
    _check(config)
    weights = tuple(weight for weight in adapter_tensors(folder) if BASE_LAYER not in weight.name)
    adapted = replace(architecture, adapter_weights=weights)
    _check_shapes(adapted, folder)
    return adapted


def _check(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotSupportedError(
            f"an adapter of type {kind!r} cannot be loaded; only LORA can", knob="peft_type", value=kind
        )
    if config.get("use_dora"):
        raise NotSupportedError(
            "a DoRA adapter cannot run beside its base: its forward is not counted; merge it first with "
            "merge_lora_then_quantize()",
            knob="use_dora",
            value=True,
        )


def _check_shapes(architecture: Architecture, folder: Path) -> None:
    """Refuse an adapter whose factors do not fit the base's matrices."""
    every = (*architecture.weights(), architecture.head)  # a tied head is a module too
    base = {weight.name.removesuffix(".weight"): weight.shape for weight in every}
    for weight in architecture.adapter_weights:
        module, factor, _ = weight.name.partition(".lora_")
        if not factor:
            continue
        shape = base.get(module)
        inner = weight.name.endswith("lora_A.weight")
        outer = weight.name.endswith("lora_B.weight")
        if shape is None or (inner and weight.shape[1] != shape[1]) or (outer and weight.shape[0] != shape[0]):
            has = "no such module" if shape is None else f"a matrix of {list(shape)}"
            raise CheckpointError(
                f"adapter {str(folder)!r} is for another base: {weight.name!r} has shape {list(weight.shape)}, the "
                f"base has {has}; use the base it was trained on",
                path=str(folder / WEIGHTS),
            )
