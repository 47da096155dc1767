"""A matrix that is stored quantized, in a format whose parts config.json alone says, held against that format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.errors import CheckpointError
from qwen_vram.files.header import Tensor

# A part of a 4-bit matrix by the name that checkpoints give it; the offset is in a JSON text.
# Source: bitsandbytes 0.50.2, functional.py, QuantState.as_dict.
_NAMES = {"code": "quant_map", "state2.absmax": "nested_absmax", "state2.code": "nested_quant_map"}


def is_stored_quantized(weight: Weight, architecture: Architecture) -> bool:
    """Whether the checkpoint stores `weight` in the format that config.json names."""
    if architecture.stored_format is None or not weight.is_linear:
        return False
    return weight.role != "head" or architecture.stored_head


def check_parts(
    weight: Weight, tensor: Tensor, tensors: Mapping[str, Tensor], architecture: Architecture, folder: Path
) -> None:
    """Hold a matrix that is stored quantized against its format: the bytes of its codes, and all that goes beside.

    Raises:
        CheckpointError: they do not fit.
    """
    name = str(architecture.stored_format)
    codes = FORMATS[name].part_sizes(weight.shape)[0]
    beside = _beside(weight, name)
    missing = next((part for part in beside if part not in tensors), None)
    if tensor.nbytes != codes or missing:
        found = f"{tensor.nbytes} bytes" if tensor.nbytes != codes else f"no {missing!r}"
        raise CheckpointError(
            f"{weight.name!r} is not the {name} matrix that config.json says: {codes} bytes of codes with "
            f"{beside[0]!r} are expected, got {found}; download the checkpoint again",
            path=str(folder / tensor.file),
        )


def _beside(weight: Weight, name: str) -> list[str]:
    """What a checkpoint holds beside the codes of a matrix in the format `name`, its scales first."""
    storage = FORMATS[name]
    parts = [part.name for part in storage.parts[1:]]
    if storage.library != "bitsandbytes" or storage.bits != 4:
        return [f"{weight.name.removesuffix('.weight')}.{part}" for part in parts]
    state = f"quant_state.bitsandbytes__{name.removesuffix('-plain')}"
    return [f"{weight.name}.{_NAMES.get(part, part)}" for part in parts if part != "offset"] + [
        f"{weight.name}.{state}"
    ]
