"""A merge in GPTQ's format, and its comparison with the merge in float32.

The merge is written in 16 bits first, and GPTQModel quantizes it.

Source of the layout: AutoGPTQ 0.7.1, and GPTQModel 7.6.0 with format "gptq".
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qwen_vram.checkpoints.files.local import read_tensors
from qwen_vram.errors import WorkloadError
from qwen_vram.lora.codecs.registry import GPTQ
from qwen_vram.lora.delta import LoadedUpdate
from qwen_vram.lora.fidelity import Proof
from qwen_vram.lora.pipeline import merged_rows
from qwen_vram.lora.plan import MergePlan, matrices
from qwen_vram.lora.tensor_file import pieces
from qwen_vram.runtime.gptq.job import GptqJob, gptq_job
from qwen_vram.runtime.gptq.sample_texts import Calibration
from qwen_vram.runtime.tensors.checkpoint import open_checkpoint

_WORD = 32


def merge_job(
    quantize: str | None, calibration: Calibration | None, device: str | None, max_shard_size: str | int
) -> GptqJob | None:
    """Return the job of GPTQModel for the merge; `None` for a format that is not GPTQ's.

    Raises:
        WorkloadError: sample texts are missing, or not needed.
        BackendUnavailableError, UnitError: as `quantize_gptq()`.
    """
    if quantize in GPTQ:
        return gptq_job(calibration, bits=int(quantize[-1]), device=device, max_shard_size=max_shard_size)
    if calibration is not None:
        raise WorkloadError(
            f"calibration: quantize={quantize!r} needs no sample texts, GPTQ does; leave them out, or use "
            "quantize='gptq-int4'",
            name="calibration",
            got=calibration,
        )
    return None


def write_gptq(
    plan: MergePlan,
    job: GptqJob,
    folder: Path,
    *,
    write_merged: Callable[[Path], dict[str, Proof]],
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, Proof], tuple[str, ...]]:
    """Write the weights and config.json of `plan`, quantized by `job`, into `folder`.

    Args:
        write_merged: Writes the merge in 16 bits into a folder, and returns its proofs.

    Returns:
        The proofs by tensor, and the names of the files.
    """
    merged = folder / "merged"
    merged.mkdir()
    plan.companions.write(merged, config=True)
    proofs = write_merged(merged)
    files = job.write(open_checkpoint(merged), folder, progress=progress)
    shutil.rmtree(merged)
    return proofs | _prove(plan, folder, job.bits, device), files


def _prove(plan: MergePlan, folder: Path, bits: int, device: torch.device) -> dict[str, Proof]:
    """Compare every quantized matrix that the adapters change with the merge in float32."""
    proofs = {}
    quantized = matrices(plan.checkpoint)
    for target in plan.targets.targets:
        if not target.updates or target.name not in quantized:
            continue
        stored = _parts(folder, target.name.removesuffix(".weight"))
        updates = [LoadedUpdate(update, target.base, device) for update in target.updates]
        proof = proofs[target.name] = Proof()
        for start, stop in pieces(*target.shape):
            base, merged, _ = merged_rows(target, updates, start, stop, device)
            proof.add(base, merged, dequantized(stored, bits, start, stop).to(device))
    return proofs


def _parts(folder: Path, module: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    files = {name: tensor.file for name, tensor in read_tensors(folder).items() if name.startswith(f"{module}.")}
    parts = {}
    for name, file in files.items():
        with safe_open(folder / file, "pt") as tensors:
            parts[name.rpartition(".")[2]] = tensors.get_tensor(name)
    return parts


def dequantized(parts: Mapping[str, torch.Tensor], bits: int, start: int, stop: int) -> torch.Tensor:
    """Return rows `start` to `stop` of a matrix in float32, (rows, columns), as the kernels compute with them.

    Args:
        parts: `qweight` (columns * bits / 32, rows), `qzeros` (groups, rows * bits / 32) with one taken off, `scales`
            (groups, rows), and `g_idx` (columns,), the group of each column.
    """
    shifts, mask = torch.arange(0, _WORD, bits, dtype=torch.int32), 2**bits - 1
    codes = (parts["qweight"][:, None, start:stop] >> shifts[:, None] & mask).flatten(0, 1)
    zeros = (parts["qzeros"][:, :, None] >> shifts & mask).flatten(1)[:, start:stop] + 1
    group = parts["g_idx"].long()
    rows: torch.Tensor = (codes - zeros[group]) * parts["scales"][:, start:stop].float()[group]
    return rows.T.contiguous()
