"""Check of every 16-bit tensor against config.json, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.names import HEAD
from qwen_vram.checkpoints.tensors.quantized_names import FLOATS
from qwen_vram.errors import CheckpointError
from qwen_vram.spec.architecture import Architecture

# Buffers of old checkpoints, which `transformers` silently leaves out.
_IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def check_tensors(architecture: Architecture, tensors: Mapping[str, Tensor], folder: Path) -> tuple[str, ...]:
    """Check `tensors`, by the model's names, against `architecture`: names, shapes and dtypes.

    Returns:
        Texts for warnings: tensors that the model has no module for.

    Raises:
        CheckpointError: a tensor is missing, empty, or of another shape or dtype.
    """
    missing = []
    shapes = architecture.shapes()
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            missing.append(name)
        elif tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{name!r} is stored as {tensor.dtype}; {', '.join(FLOATS)} are read, and quantized while they "
                "load: save the model in one of them",
                path=str(folder / tensor.file),
            )
        elif tensor.shape != shape:
            from qwen_vram.checkpoints.tensors.advice import wrong_shape

            weight = next(weight for weight in architecture.weights() if weight.name == name)
            raise wrong_shape(architecture, weight, tensor, tensors, folder)
    if missing:
        from qwen_vram.checkpoints.tensors.advice import lacking_tensors

        raise lacking_tensors(architecture, missing, tensors, folder)
    return _extras(architecture, tensors) if len(tensors) > len(shapes) else ()


def _extras(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return one line about tensors that the model has no module for; empty for a quantized checkpoint."""
    if architecture.stored_format is not None:
        return ()
    wanted = {weight.name for weight in architecture.weights()} | {HEAD}
    extras = [name for name in tensors if name not in wanted and not name.endswith(_IGNORED)]
    if not extras:
        return ()
    from qwen_vram.checkpoints.files.absent import shown

    return (
        f"the model has no place for {len(extras)} of the checkpoint's tensors, and they are left out, as transformers "
        f"does: {shown(extras)}; if they are layers or a head that belong to it, config.json is of another model",
    )
