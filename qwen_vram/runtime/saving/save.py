"""`LoadedModel.save_quantized()`: write the weights as a quantized checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_vram.checkpoints.files.local import read_config
from qwen_vram.checkpoints.files.names import CONFIG, NAMED_WEIGHTS
from qwen_vram.checkpoints.files.sidecars import companion_files, copy_files
from qwen_vram.checkpoints.output.folder import OutputFolder
from qwen_vram.checkpoints.output.safetensors_layout import Shard, TensorSlot, disk_bytes, lay_out
from qwen_vram.errors import NotSupportedError, UnknownNameError
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.backends.base import SavingBackend
from qwen_vram.runtime.progress import progress_bar
from qwen_vram.runtime.saving.writer import CheckpointWriter
from qwen_vram.runtime.tensors.checkpoint import open_checkpoint
from qwen_vram.runtime.torch_dtypes import ROWS
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMAT_NAMES, FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """The report of a written checkpoint.

    Attributes:
        weights, lm_head: Storage formats.
        total_bytes: Bytes of all tensors.
        files: The safetensors files.
    """

    out: str
    weights: str
    lm_head: str
    total_bytes: int
    files: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the report as one line."""
        return (
            f"{self.out}: {self.weights} weights, {self.lm_head} head, {self.total_bytes:,} bytes "
            f"({format_bytes(self.total_bytes)}) in {len(self.files)} file{'s' if len(self.files) > 1 else ''}, "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class _Module:
    """A module with its own tensors, by its name in the model, and their positions in a file."""

    name: str
    slots: tuple[TensorSlot, ...]


def saving_backend(weights: str) -> SavingBackend:
    """Return the backend that saves the storage format `weights`.

    Raises:
        NotSupportedError: the format is not quantized, or its backend cannot save.
        UnknownNameError: the format is not known.
    """
    if weights not in FORMAT_NAMES:
        saved = tuple(name for name, storage in FORMATS.items() if storage.is_quantized_on_load)
        raise UnknownNameError("format to save", weights, saved)
    backend = get_backend(weights)
    if isinstance(backend, SavingBackend):
        return backend
    why = (
        "they are not quantized, and the checkpoint that they came from holds them already; load it with "
        "weights='nf4', or save a changed model by its own model.save_pretrained()"
        if FORMATS[weights].is_dense
        else f"the backend {backend.name!r} does not say how; use the library that wrote the checkpoint"
    )
    raise NotSupportedError(f"weights={weights!r} cannot be saved quantized: {why}", knob="weights", value=weights)


def check_output(out: Path, source: str, *, weights: str, max_shard_size: str | int, overwrite: bool) -> None:
    """Refuse before loading the arguments that `save` refuses for every model; `source` is a folder, or on the hub.

    Raises:
        NotSupportedError, CheckpointError, UnitError: as for `save`.
    """
    saving_backend(weights)
    parse_bytes(max_shard_size, name="max_shard_size")
    sources = [Path(source)] if Path(source).is_dir() else []
    OutputFolder(out, needed_bytes=0, sources=sources, overwrite=overwrite)


def save(
    model: PreTrainedModel,
    architecture: Architecture,
    profile: Profile,
    *,
    source: Path,
    out: Path,
    max_shard_size: str | int,
    overwrite: bool,
    progress: bool,
) -> SaveReport:
    """Write `model` to `out`; see `LoadedModel.save_quantized`. `source` is the checkpoint that it was loaded from."""
    began = time.monotonic()
    max_shard_bytes = parse_bytes(max_shard_size, name="max_shard_size")
    config = _config(source, model, saving_backend(profile.weights).saved_config(model, profile))
    modules = list(_modules(model))
    # A tied head may have got a separate tensor.
    _check(modules, replace(architecture, tie_word_embeddings=model.config.tie_word_embeddings))
    shards = lay_out(modules, max_shard_bytes)
    files = companion_files(source)
    needed = disk_bytes(shards, files.values(), config)
    with OutputFolder(out, needed_bytes=needed, sources=[source], overwrite=overwrite) as output:
        copy_files(files, output.folder)
        (output.folder / CONFIG).write_text(config, encoding="utf-8")
        total_bytes = _write(model, shards, output.folder, progress)
        open_checkpoint(output.folder)  # checks that its headers match config.json
        output.publish()
    return SaveReport(
        out=str(out),
        weights=profile.weights,
        lm_head=profile.head_format,
        total_bytes=total_bytes,
        files=tuple(shard.file for shard in shards),
        seconds=round(time.monotonic() - began, 3),
    )


def _modules(model: PreTrainedModel) -> Iterator[_Module]:
    """Yield every module with its own tensors, in the model's order, without a head that is tied to the embeddings."""
    for name, module in model.named_modules():
        if next(module.children(), None) is not None or _is_table(model, module):
            continue
        tensors = module.state_dict(prefix=f"{name}.")
        slots = tuple(
            TensorSlot(key, ROWS[tensor.dtype].stored, tuple(tensor.shape), tensor.nbytes)
            for key, tensor in tensors.items()
        )
        if slots:
            yield _Module(name, slots)


def _is_table(model: PreTrainedModel, module: torch.nn.Module) -> bool:
    """Tell if `module` is a head that shares the embedding's tensor."""
    table = model.get_input_embeddings()
    return module is model.get_output_embeddings() and module.weight.data_ptr() == table.weight.data_ptr()


def _check(modules: list[_Module], architecture: Architecture) -> None:
    """Refuse a model with more or fewer tensors than its config.json says, mostly because of a LoRA adapter."""
    wanted = {weight.name for weight in architecture.weights()}
    known = {name.rpartition(".")[0] for name in wanted}
    unknown = next((module.name for module in modules if module.name not in known), None)
    if unknown is not None:
        raise NotSupportedError(
            f"the model has a module {unknown!r}, which its checkpoint has not: an adapter on top is not saved. Take "
            "it off first, or merge it into the 16-bit base: qv.merge_lora_then_quantize(base, adapter, out)",
            knob="adapter",
            value=unknown,
        )
    missing = sorted(wanted - {slot.name for module in modules for slot in module.slots})
    if missing:
        raise NotSupportedError(
            f"the model lacks {missing[0]!r} since it was changed after loading; load it again and save that",
            knob="weights",
            value=missing[0],
        )


def _config(source: Path, model: PreTrainedModel, quantization: dict[str, Any]) -> str:
    """Return the text of the output's config.json: the source's, with the present formats of the weights."""
    config = {key: value for key, value in read_config(source).items() if key != NAMED_WEIGHTS}
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = ROWS[model.dtype].torch
    config |= {"tie_word_embeddings": model.config.tie_word_embeddings, "quantization_config": quantization}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _write(model: PreTrainedModel, shards: tuple[Shard[_Module], ...], folder: Path, progress: bool) -> int:
    """Write the shards and their index, one tensor at a time, and return the bytes of all tensors."""
    writer = CheckpointWriter(folder, shards)
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    try:
        with progress_bar("saving", total, shown=progress) as advance:
            for shard in shards:
                writer.open(shard)
                for module in shard.weights:
                    tensors = model.get_submodule(module.name).state_dict(prefix=f"{module.name}.")
                    for slot in module.slots:
                        writer.write(slot.name, tensors[slot.name])
                        advance(slot.nbytes)
                writer.finish(shard)
        writer.close()
        return writer.total_bytes
    finally:
        writer.abandon()
