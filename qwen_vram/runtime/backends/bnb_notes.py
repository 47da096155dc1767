"""Check of the metadata that bitsandbytes wrote into a checkpoint.

Source of the notes: bitsandbytes 0.50.2, functional.py (QuantState.as_dict) and nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.errors import CheckpointError
from qwen_vram.spec.architecture import Architecture

_STATE = ".quant_state.bitsandbytes__"
# The layout of int8 codes by rows, as `weight_format` numbers it. Other layouts were for GPUs, and nothing reads them.
_ROW_LAYOUT = 0


def check_notes(folder: Path, tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Refuse a quantization state, or a layout of int8 codes, that does not belong to the matrix beside it.

    About 200 bytes of each matrix are read.

    Raises:
        CheckpointError: the metadata do not match, or a file cannot be read.
    """
    shapes = {weight.name: weight.shape for weight in (*architecture.weights(), architecture.head)}
    for name, tensor in tensors.items():
        if name.endswith(".weight_format") and _read(folder, tensor)[:1] != bytes([_ROW_LAYOUT]):
            raise CheckpointError(
                f"{name!r} says that int8 codes lie in a layout for one kind of GPU, which no library reads now; "
                "quantize the 16-bit model again, or load it with weights='int8'",
                path=str(folder / tensor.file),
            )
        matrix, state, kind = name.partition(_STATE)
        if state and matrix in shapes:
            _check_state(matrix, kind, shapes[matrix], tensors, _read(folder, tensor), folder / tensor.file)


def _check_state(
    matrix: str, kind: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor], text: bytes, path: Path
) -> None:
    maxima = tensors[f"{matrix}.absmax"].shape[0]
    try:
        state = json.loads(text)
        blocks = -(-(shape[0] * shape[1]) // state["blocksize"])
        found = (state["quant_type"], tuple(state["shape"]), blocks)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the quantization state of {matrix!r} is not what bitsandbytes writes ({type(error).__name__}); save the "
            "model again with save_pretrained() of transformers",
            path=str(path),
        ) from error
    if found != (kind, shape, maxima):
        raise CheckpointError(
            f"the quantization state of {matrix!r} is of a {found[0]} matrix of shape {list(found[1])} in {blocks:,} "
            f"blocks, got {kind} codes of shape {list(shape)} in {maxima:,} blocks; the state is of another matrix: "
            "save the model again with save_pretrained() of transformers",
            path=str(path),
        )


def _read(folder: Path, tensor: Tensor) -> bytes:
    path = folder / tensor.file
    try:
        with path.open("rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.nbytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}; check the file", path=str(path)) from error
