"""The whole merge settled and checked before a byte is written: tensors, formats, shards, files and room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vram.files.layout import Shard, disk_bytes, lay_out
from qwen_vram.lora.adapter import Adapter, check_finite
from qwen_vram.lora.codec import Codec
from qwen_vram.lora.companions import carried_files, merged_config, tokenizer_source
from qwen_vram.lora.layout import Weight, weight_of
from qwen_vram.lora.stored import stored_tensors
from qwen_vram.lora.targets import Targets, merge_targets
from qwen_vram.runtime.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """What will be written.

    Attributes:
        files: Files to copy, by their name in the output.
        config: Text of config.json.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    targets: Targets
    shards: tuple[Shard[Weight], ...]
    files: dict[str, Path]
    config: str
    tokenizer: Path

    @property
    def needed_bytes(self) -> int:
        """The most that the output takes on the disk; exact but for a few MiB of small files."""
        return disk_bytes(self.shards, self.files.values(), self.config)

    @property
    def sources(self) -> list[Path]:
        """Folders that are read."""
        return [self.checkpoint.folder, *(adapter.folder for adapter in self.adapters)]


def plan_merge(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], codec: Codec | None, max_shard_bytes: int
) -> MergePlan:
    """The plan of merging `adapters` into `checkpoint` in the format of `codec`.

    Raises:
        AdapterError: an adapter does not fit, or holds a NaN.
        CheckpointError: the base's files cannot be read.
    """
    stored = stored_tensors(checkpoint.files)
    targets = merge_targets(checkpoint.architecture, str(checkpoint.folder), stored, adapters)
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
        files=carried_files(checkpoint.folder, adapters, targets),
        config=merged_config(checkpoint.files.config, targets, quantization_config),
        tokenizer=tokenizer_source(checkpoint.folder, adapters, targets),
    )


def matrices(checkpoint: Checkpoint) -> set[str]:
    """Names of the weights that are quantized: the matrices of attention and MLP, not the head."""
    return {weight.name for weight in checkpoint.architecture.weights() if weight.is_linear and weight.role != "head"}
