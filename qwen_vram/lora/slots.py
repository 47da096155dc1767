"""Stored tensors of a merged weight, in the base's dtype or a codec's format."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_vram.checkpoints.output.safetensors_layout import LATE_BYTES, TensorSlot
from qwen_vram.dtypes import BY_STORED
from qwen_vram.lora.codecs.base import Codec, Part
from qwen_vram.lora.targets import Target


@dataclass(frozen=True, slots=True)
class Weight:
    """One merged tensor and the slots that hold it. Without a codec it keeps its dtype, in one slot."""

    target: Target
    slots: tuple[TensorSlot, ...]
    codec: Codec | None


def weight_of(target: Target, codec: Codec | None) -> Weight:
    """Return the slots that `target` takes in the format of `codec`."""
    if codec is None:
        nbytes = target.base.nbytes // math.prod(target.base.shape) * math.prod(target.shape)
        return Weight(target, (TensorSlot(target.name, target.base.kind, target.shape, nbytes),), None)
    module = target.name.removesuffix(".weight")
    return Weight(target, tuple(_slot(module, part) for part in codec.parts(target.shape)), codec)


def _slot(module: str, part: Part) -> TensorSlot:
    nbytes = LATE_BYTES if part.shape is None else math.prod(part.shape) * BY_STORED[part.kind].nbytes
    return TensorSlot(f"{module}{part.ending}", part.kind, part.shape, nbytes)
