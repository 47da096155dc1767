"""`quantize_gptq()`: quantize a 16-bit checkpoint to the GPTQ format."""

from __future__ import annotations

import time
from pathlib import Path

from qwen_vram.checkpoints.adapters.folder import check_no_adapter_beside
from qwen_vram.checkpoints.files.local import read_tensors
from qwen_vram.checkpoints.files.sidecars import companion_files, copy_files
from qwen_vram.checkpoints.output.folder import OutputFolder
from qwen_vram.errors import CheckpointError
from qwen_vram.runtime.gptq.job import gptq_job
from qwen_vram.runtime.gptq.sample_texts import Calibration
from qwen_vram.runtime.saving.save import SaveReport
from qwen_vram.runtime.tensors.checkpoint import open_checkpoint


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
    """Quantize the matrices of attention and MLP by GPTQ, and write a checkpoint that `load()` loads without a knob.

    GPTQModel quantizes layer by layer in a separate process. The head stays in 16 bits. The output appears at `out`
    only when it is complete.

    Args:
        model: A 16-bit checkpoint: a folder, a catalog name or a hub id.
        out: A new folder.
        calibration: Sample texts, or a file with one on each line (`.jsonl`: in JSON). Pass some hundred texts of the
            kind that the model will read, in its chat format for a chat model. 2,048 tokens of each are used.
        bits: 4 or 8.
        group_size: 128, 64 or 32 weights that share a scale.
        device: `"cuda"` or `"cpu"`; `None` uses the GPU if there is one.
        max_shard_size: The most tensor data in one file.
        overwrite: Replace a checkpoint at `out`; it stays there until the new one is complete.
        progress: Show a bar on standard error.

    Raises:
        WorkloadError: no calibration texts.
        BackendUnavailableError: GPTQModel or the GPU is missing.
        CheckpointError, ConfigError, HubError: the checkpoint or the output folder cannot be used, or a matrix does not
            divide into groups.
        QuantizationFailedError: GPTQModel failed; the message has the end of its log.
        UnknownNameError, UnitError: `bits`, `group_size` or `max_shard_size` is not allowed.

    Warns:
        UserWarning: the texts have fewer tokens than the widest matrix has columns.
    """
    began = time.monotonic()
    job = gptq_job(calibration, bits=bits, group_size=group_size, device=device, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(model)
    check_no_adapter_beside(checkpoint.folder)
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
