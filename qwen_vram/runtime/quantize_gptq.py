"""`quantize_gptq()`: a 16-bit checkpoint to GPTQ's codes, in the format that AutoGPTQ wrote and GPTQModel does."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.errors import CheckpointError, ConfigError, UnknownNameError
from qwen_vram.files.companions import companion_files, copy_files
from qwen_vram.files.local import CONFIG, read_config, read_tensors
from qwen_vram.files.output import OutputFolder
from qwen_vram.runtime.backends.gptq_library import check_installed
from qwen_vram.runtime.calibration import Calibration, calibration_texts, tokens
from qwen_vram.runtime.checkpoint import Checkpoint, open_checkpoint
from qwen_vram.runtime.devices import working_device
from qwen_vram.runtime.gptq_process import run_worker
from qwen_vram.runtime.progress import progress_bar
from qwen_vram.runtime.save import SaveReport
from qwen_vram.units import parse_bytes

_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128)
# Rows that the kernels divide by. Source: GPTQModel 7.6.0, tritonv2.py.
_ROWS = 32


def quantize_gptq(
    model: str | Path,
    out: str | Path,
    *,
    calibration: Calibration,
    bits: int = 4,
    group_size: int = 128,
    device: str | None = None,
    max_shard_size: str | int = "4GB",
    overwrite: bool = False,
    progress: bool = True,
) -> SaveReport:
    """Quantize the matrices of attention and MLP by GPTQ, and write a checkpoint that `load()` takes with no knob.

    GPTQModel does it, in a process of its own, layer by layer; the head keeps its 16 bits. Nothing appears at `out`
    before all of it is there, and then all at once.

    Args:
        model: A 16-bit checkpoint: a folder, a catalog name or a hub id.
        out: A new folder.
        calibration: Sample texts, or a file with one on each line (`.jsonl`: in JSON). Some hundred, of the kind that
            the model will read, in its chat format where it is one for chats; 2,048 tokens of each are used.
        bits: 4 or 8.
        group_size: 128, 64 or 32 weights that share a scale.
        device: `"cuda"` or `"cpu"`; `None` takes the GPU where there is one.
        max_shard_size: The most tensor data in one file.
        overwrite: Replace a checkpoint that is at `out`; it stays there until the new one is complete.
        progress: Show a bar on standard error.

    Raises:
        WorkloadError: no calibration texts.
        BackendUnavailableError: GPTQModel, or the GPU, is not here.
        CheckpointError, ConfigError, HubError: the checkpoint or the output folder cannot be used, or a matrix does not
            divide into groups.
        QuantizationFailedError: GPTQModel failed; the message has the end of its log.
        UnknownNameError, UnitError: `bits`, `group_size` or `max_shard_size` is not one.

    Warns:
        UserWarning: there are fewer tokens than the widest matrix has columns.
    """
    began = time.monotonic()
    job = gptq_job(calibration, bits=bits, group_size=group_size, device=device, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(model)
    if checkpoint.architecture.stored_format is not None:
        raise CheckpointError(
            f"{str(model)!r} is stored as {checkpoint.architecture.stored_format!r} already; pass the 16-bit "
            "checkpoint it was made from",
            path=str(checkpoint.folder),
        )
    job.check(checkpoint.architecture)
    needed = job.needed_bytes(checkpoint.architecture)
    with OutputFolder(Path(out), needed_bytes=needed, sources=[checkpoint.folder], overwrite=overwrite) as output:
        copy_files(companion_files(checkpoint.folder), output.folder)
        files = job.write(checkpoint, output.folder, progress=progress)
        output.publish()
    return SaveReport(
        out=str(out),
        weights=job.format,
        lm_head="bf16",
        total_bytes=sum(tensor.nbytes for tensor in read_tensors(Path(out)).values()),
        files=files,
        seconds=round(time.monotonic() - began, 3),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqJob:
    """How a checkpoint is quantized, not knowing which."""

    texts: list[str]
    bits: int
    group_size: int
    device: str
    max_shard_bytes: int

    @property
    def format(self) -> str:
        """The storage format's name."""
        return f"gptq-int{self.bits}"

    def check(self, architecture: Architecture) -> None:
        """Refuse matrices that do not divide into groups of columns, or into the kernels' rows.

        Raises:
            ConfigError: as said.
        """
        for weight in _matrices(architecture):
            rows, columns = weight.shape
            if rows % _ROWS or columns % self.group_size:
                raise ConfigError(
                    f"{weight.name!r} is {rows:,} x {columns:,}: GPTQ's kernels take rows in multiples of {_ROWS} and "
                    f"columns in multiples of group_size, got group_size={self.group_size}; use a smaller group, or "
                    "'nf4', which has no such limit"
                )

    def needed_bytes(self, architecture: Architecture) -> int:
        """Room for the result, and for the 16-bit layers that GPTQModel puts on the disk while it works."""
        storage = FORMATS[self.format]._replace(group_size=self.group_size)
        quantized = {weight.name for weight in _matrices(architecture)}
        return sum(
            2 * weight.numel + (storage.nbytes(weight.shape) if weight.name in quantized else 2 * weight.numel)
            for weight in architecture.weights()
        )

    def write(self, checkpoint: Checkpoint, folder: Path, *, progress: bool) -> tuple[str, ...]:
        """Write the quantized weights of `checkpoint` and their config.json into `folder`; the names of the files."""
        samples = [ids for ids in tokens(checkpoint.folder, self.texts) if ids]
        _warn_of_few(samples, checkpoint.architecture)
        config = read_config(checkpoint.folder)
        dtype = "float16" if config.get("dtype", config.get("torch_dtype")) == "float16" else "bfloat16"
        work = folder / "work"
        result = work / "result"
        work.mkdir()
        layers = checkpoint.architecture.num_hidden_layers
        each = 2 * sum(weight.numel for weight in checkpoint.architecture.block)
        with progress_bar("quantizing", layers * each, shown=progress) as advance:
            run_worker(
                {
                    "source": str(checkpoint.folder.absolute()),
                    "result": str(result.absolute()),
                    "offload": str((work / "offload").absolute()),
                    "bits": self.bits,
                    "group_size": self.group_size,
                    "device": self.device,
                    "dtype": dtype,
                    "samples": samples,
                    "max_shard_bytes": self.max_shard_bytes,
                },
                work,
                lambda: advance(each),
            )
        files = sorted(path for path in result.iterdir() if ".safetensors" in path.name)
        for path in files:
            path.rename(folder / path.name)
        (folder / CONFIG).write_text(_config(config, read_config(result), dtype), encoding="utf-8")
        shutil.rmtree(work)
        open_checkpoint(folder)  # by its headers it is the model that config.json says
        return tuple(path.name for path in files if path.suffix == ".safetensors")


def gptq_job(
    calibration: Calibration | None,
    *,
    bits: int = 4,
    group_size: int = 128,
    device: str | None = None,
    max_shard_size: str | int = "4GB",
) -> GptqJob:
    """The job that these arguments of `quantize_gptq` say, checked as far as no checkpoint is needed for it."""
    for name, value, allowed in (("bits", bits, _BITS), ("group_size", group_size, _GROUP_SIZES)):
        if value not in allowed:
            raise UnknownNameError(name, value, tuple(map(str, allowed)))
    texts = calibration_texts(calibration)
    check_installed("quantizing by GPTQ")
    return GptqJob(
        texts=texts,
        bits=bits,
        group_size=group_size,
        device=str(working_device(device)),
        max_shard_bytes=parse_bytes(max_shard_size, name="max_shard_size"),
    )


def _matrices(architecture: Architecture) -> Any:
    return [weight for weight in architecture.weights() if weight.is_linear and weight.role != "head"]


def _config(source: dict[str, object], written: dict[str, Any], dtype: str) -> str:
    """The text of config.json: the source's, with what GPTQModel says of the quantization, less its own paths."""
    quantization = dict(written["quantization_config"])
    meta = {key: value for key, value in quantization.get("meta", {}).items() if not key.startswith("offload_to_disk")}
    dtypes = dict.fromkeys({"dtype", "torch_dtype"} & source.keys() or {"dtype"}, dtype)
    config = {**source, **dtypes, "quantization_config": {**quantization, "meta": meta}}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _warn_of_few(samples: list[list[int]], architecture: Architecture) -> None:
    count, widest = sum(map(len, samples)), max(weight.shape[1] for weight in _matrices(architecture))
    if count < widest:
        warnings.warn(
            f"calibration has {count:,} tokens in {len(samples):,} samples, fewer than the {widest:,} columns of the "
            "widest matrix: codes will suit little else; pass more texts",
            stacklevel=4,
        )
