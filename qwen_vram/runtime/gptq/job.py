"""The job of a GPTQ quantization: checked first, then run in a separate process."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.checkpoints.files.local import read_config
from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.dtypes import BF16, FP16
from qwen_vram.errors import ConfigError, UnknownNameError
from qwen_vram.runtime.backends.gptq_library import check_installed
from qwen_vram.runtime.gptq.process import run_worker
from qwen_vram.runtime.gptq.sample_texts import Calibration, calibration_texts, tokens
from qwen_vram.runtime.loading.devices import working_device
from qwen_vram.runtime.progress import progress_bar
from qwen_vram.runtime.tensors.checkpoint import Checkpoint, open_checkpoint
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.layers import Weight
from qwen_vram.units import parse_bytes

_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128)
# The kernels need a multiple of this number of rows. Source: GPTQModel 7.6.0, tritonv2.py.
_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqJob:
    """Settings of a quantization, without its checkpoint."""

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
        """Refuse matrices that do not divide into groups of columns, or into the rows of the kernels.

        Raises:
            ConfigError: a matrix does not divide.
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
        """Return the bytes on the disk for the result, and for the 16-bit layers that GPTQModel writes meanwhile."""
        storage = FORMATS[self.format]._replace(group_size=self.group_size)
        quantized = {weight.name for weight in _matrices(architecture)}
        return sum(
            2 * weight.numel + (storage.nbytes(weight.shape) if weight.name in quantized else 2 * weight.numel)
            for weight in architecture.weights()
        )

    def write(self, checkpoint: Checkpoint, folder: Path, *, progress: bool) -> tuple[str, ...]:
        """Write the quantized weights of `checkpoint` and their config.json into `folder`; return the files' names."""
        samples = [ids for ids in tokens(checkpoint.folder, self.texts) if ids]
        _warn_of_few(samples, checkpoint.architecture)
        config = read_config(checkpoint.folder)
        dtype = FP16.torch if checkpoint.architecture.dtype == FP16.name else BF16.torch
        work = folder / "work"
        result = work / "result"
        work.mkdir()
        layers = checkpoint.architecture.num_hidden_layers
        each = 2 * sum(layer.numel for layer in checkpoint.architecture.layers) // layers
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
        open_checkpoint(folder)  # checks that its headers match config.json
        return tuple(path.name for path in files if path.suffix == ".safetensors")


def gptq_job(
    calibration: Calibration | None,
    *,
    bits: int = 4,
    group_size: int = 128,
    device: str | None = None,
    max_shard_size: str | int = "4GB",
) -> GptqJob:
    """Return the job for these arguments of `quantize_gptq`, checked as far as possible without a checkpoint."""
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


def _matrices(architecture: Architecture) -> list[Weight]:
    return [weight for weight in architecture.weights() if weight.is_linear and weight.role != "head"]


def _config(source: dict[str, object], written: dict[str, Any], dtype: str) -> str:
    """Return the text of config.json: the source's, with GPTQModel's quantization settings, but not its paths."""
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
