"""The plan of a merge: tensors, formats, shards and files, checked before writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vram.checkpoints.output.safetensors_layout import Shard, disk_bytes, lay_out
from qwen_vram.lora.codecs.base import Codec
from qwen_vram.lora.output_files import Companions, companions
from qwen_vram.lora.slots import Weight, weight_of
from qwen_vram.lora.targets import Targets, merge_targets
from qwen_vram.lora.tensor_file import stored_tensors
from qwen_vram.lora.weighted import WeightedAdapter, check_finite
from qwen_vram.runtime.tensors.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """The contents of the output, computed before anything is written.

    Attributes:
        companions: The files beside the weights.
    """

    checkpoint: Checkpoint
    adapters: tuple[WeightedAdapter, ...]
    targets: Targets
    shards: tuple[Shard[Weight], ...]
    companions: Companions

    @property
    def needed_bytes(self) -> int:
        """The most bytes that the output takes on the disk; exact except for a few MiB of small files."""
        texts = "".join(self.companions.texts.values())
        return disk_bytes(self.shards, self.companions.copied.values(), texts)

    @property
    def sources(self) -> list[Path]:
        """Folders that are read."""
        return [self.checkpoint.folder, *(adapter.folder for adapter in self.adapters)]


def plan_merge(
    checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter], codec: Codec | None, max_shard_bytes: int
) -> MergePlan:
    """Return the plan of merging `adapters` into `checkpoint` in the format of `codec`.

    Raises:
        AdapterError: an adapter does not fit, or holds a NaN.
        CheckpointError: the base's files cannot be read.
    """
    stored = stored_tensors(checkpoint.files)
    targets = merge_targets(checkpoint.architecture, checkpoint.name, stored, adapters)
    for adapter in adapters:
        check_finite(adapter)
    quantized = matrices(checkpoint) if codec is not None else {}
    weights = [weight_of(target, codec if target.name in quantized else None) for target in targets.targets]
    quantization_config = None
    if codec is not None:
        dtype = next(stored[name].dtype for name in quantized)
        quantization_config = codec.config(dtype)
    return MergePlan(
        checkpoint=checkpoint,
        adapters=tuple(adapters),
        targets=targets,
        shards=lay_out(weights, max_shard_bytes),
        companions=companions(checkpoint.files, adapters, targets, quantization_config),
    )


def matrices(checkpoint: Checkpoint) -> set[str]:
    """Return the names of the weights that are quantized: the matrices of attention and MLP, not the head."""
    return {weight.name for weight in checkpoint.architecture.weights() if weight.is_linear and weight.role != "head"}
