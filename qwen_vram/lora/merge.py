"""`merge_lora_then_quantize()`: merge adapters, quantize, and write a checkpoint."""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from qwen_vram.checkpoints.adapters.base_name import warn_of_another_base
from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import check_is_no_adapter
from qwen_vram.checkpoints.adapters.keys import shortened
from qwen_vram.checkpoints.adapters.scaling import alpha_is_ambiguous
from qwen_vram.checkpoints.files.local import read_tensors
from qwen_vram.checkpoints.files.sidecars import REPORT
from qwen_vram.checkpoints.output.folder import OutputFolder
from qwen_vram.dtypes import BY_STORED
from qwen_vram.errors import CheckpointError
from qwen_vram.lora.codecs.registry import codec_for
from qwen_vram.lora.fidelity import Proof
from qwen_vram.lora.gptq import merge_job, write_gptq
from qwen_vram.lora.pipeline import Streamer
from qwen_vram.lora.plan import MergePlan, matrices, plan_merge
from qwen_vram.lora.report import ENOUGH, MergeReport, ModuleReport
from qwen_vram.lora.weighted import AdapterLike, open_adapters
from qwen_vram.runtime.gptq.sample_texts import Calibration
from qwen_vram.runtime.loading.devices import working_device
from qwen_vram.runtime.progress import progress_bar
from qwen_vram.runtime.saving.writer import CheckpointWriter
from qwen_vram.runtime.tensors.checkpoint import Checkpoint, open_checkpoint
from qwen_vram.runtime.torch_dtypes import float32_by_default
from qwen_vram.units import parse_bytes

Quantization = Literal["nf4", "nf4-plain", "fp4", "int8", "int4", "int8-wo", "fp8", "gptq-int4", "gptq-int8"]


def merge_lora_then_quantize(
    base: str | Path,
    adapter: AdapterLike,
    out: str | Path,
    *,
    quantize: Quantization | None = "nf4",
    calibration: Calibration | None = None,
    device: str | None = None,
    max_shard_size: str | int = "4GB",
    overwrite: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge LoRA adapters into their 16-bit base in float32, quantize, and write a checkpoint that is ready to load.

        merged = base + sum over adapters of weight * (base with that adapter alone - base)

    One piece of a tensor is in memory at a time. Without quantization the result is that of PEFT's `merge_and_unload`
    in float32, rounded once to the base's dtype. With quantization, that result is quantized as it would be on load.
    The head stays in the base's dtype. The output appears at `out` only when it is complete.

    Args:
        base: The checkpoint that the adapter was trained on, not quantized: a folder, a catalog name or a hub id.
        adapter: PEFT's folder or hub id; a list of them, alone or in pairs with a weight; or a dict from them to
            weights.
        out: A new folder.
        quantize: The format of the matrices of attention and MLP; `None` keeps the base's dtypes. bitsandbytes' formats
            `"nf4"`, `"nf4-plain"`, `"fp4"` and `"int8"` load with plain transformers too. `"int4"`, `"int8-wo"` and
            `"fp8"`, on torch's own operators, load with this library's `load()` only. For `"gptq-int4"` and
            `"gptq-int8"`, `quantize_gptq()` quantizes the merge in 16 bits, which is on the disk until then.
        calibration: For GPTQ, sample texts as for `quantize_gptq()`.
        device: `"cuda"` or `"cpu"`, the device of the arithmetic; `None` uses the GPU if there is one.
        max_shard_size: The most tensor data in one file, except for a single larger tensor.
        overwrite: Replace a checkpoint at `out`; it stays there until the new one is complete.
        progress: Show a bar on standard error.

    Raises:
        AdapterError: an adapter is broken, belongs to another base, or cannot be merged exactly.
        CheckpointError, ConfigError, HubError: the base or the output folder cannot be used, or a matrix has a shape
            that `quantize` cannot hold.
        BackendUnavailableError: bitsandbytes or the GPU is missing, or a format cannot be written while merging.
        UnknownNameError, UnitError: `quantize` is not a format, or `max_shard_size` is not a size.

    Warns:
        UserWarning: less than 90 % of an update survived in some module.
    """
    began = time.monotonic()
    job = merge_job(quantize, calibration, device, max_shard_size)
    codec = codec_for(None if job else quantize)
    place = working_device(device)
    max_shard_bytes = parse_bytes(max_shard_size, name="max_shard_size")
    checkpoint = _open_base(base)
    plan = plan_merge(checkpoint, open_adapters(adapter), codec, max_shard_bytes)
    needed = plan.needed_bytes
    if job:
        job.check(checkpoint.architecture)
        needed += job.needed_bytes(checkpoint.architecture)
    _warn_of_patterns(plan)
    for one in plan.adapters:
        warn_of_another_base(one.adapter, base)
    target = Path(out)
    files = tuple(shard.file for shard in plan.shards)
    output_folder = OutputFolder(target, needed_bytes=needed, sources=plan.sources, overwrite=overwrite)
    with float32_by_default(), output_folder as output:
        plan.companions.write(output.folder, config=job is None)
        if job:
            merge = partial(_write_weights, plan, device=place, progress=progress)
            proofs, files = write_gptq(plan, job, output.folder, write_merged=merge, device=place, progress=progress)
        else:
            proofs = _write_weights(plan, output.folder, device=place, progress=progress)
        report = MergeReport(
            base=str(base),
            adapters=tuple((str(adapter.folder), adapter.weight) for adapter in plan.adapters),
            out=str(target),
            quantize=quantize,
            modules=_modules(plan, proofs, quantize, matrices(checkpoint) if quantize else set()),
            vocab_size=plan.targets.vocab_size,
            tie_word_embeddings=plan.targets.tie_word_embeddings,
            untied=plan.targets.untied,
            tokenizer=str(plan.companions.tokenizer),
            total_bytes=sum(tensor.nbytes for tensor in read_tensors(output.folder).values()),
            files=files,
            seconds=round(time.monotonic() - began, 3),
        )
        (output.folder / REPORT).write_text(report.to_json(), encoding="utf-8")
        output.publish()
    _warn_of_losses(report)
    return report


def _open_base(base: str | Path) -> Checkpoint:
    if isinstance(base, (str, Path)):
        check_is_no_adapter(Path(base))
    checkpoint = open_checkpoint(base)
    if checkpoint.files.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"base {str(base)!r} is already quantized, and merging into quantized weights erases small updates; pass "
            "the 16-bit checkpoint it was made from",
            path=str(checkpoint.folder),
        )
    return checkpoint


def _write_weights(plan: MergePlan, folder: Path, *, device: torch.device, progress: bool) -> dict[str, Proof]:
    """Write the shards and their index, and return the proofs by tensor."""
    writer = CheckpointWriter(folder, plan.shards)
    try:
        total = sum(target.base.nbytes for target in plan.targets.targets)
        with progress_bar("merging", total, shown=progress) as advance:
            proofs = Streamer(writer, device, advance).run(plan.shards)
        for name, proof in proofs.items():
            if not proof.largest_error < float("inf"):
                raise AdapterError(
                    f"merging {name!r} gives numbers that its dtype cannot hold, or the base has a NaN in it; check "
                    "the base, and the adapter's alpha and rank",
                    path=str(plan.checkpoint.folder),
                )
        writer.close()
        return proofs
    finally:
        writer.abandon()


def _modules(
    plan: MergePlan, proofs: dict[str, Proof], quantize: str | None, quantized: set[str]
) -> tuple[ModuleReport, ...]:
    return tuple(
        ModuleReport(
            name=weight.target.name,
            format=str(quantize) if weight.target.name in quantized else BY_STORED[weight.target.base.kind].name,
            share=proofs[weight.target.name].share,
            relative_size=proofs[weight.target.name].relative_size,
            largest_error=proofs[weight.target.name].largest_error,
        )
        for shard in plan.shards
        for weight in shard.weights
        if weight.target.name in proofs
    )


def _warn_of_patterns(plan: MergePlan) -> None:
    for adapter in plan.adapters:
        settings = adapter.adapter.settings
        unclear = [name for name in adapter.adapter.modules if alpha_is_ambiguous(settings, name)]
        if unclear:
            warnings.warn(
                f"alpha_pattern of {str(adapter.folder)!r} has several alphas for {shortened(unclear)}; the first in "
                "the file counts, as in PEFT, which sorts them when it saves: check that it is the one that was meant",
                stacklevel=3,
            )


def _warn_of_losses(report: MergeReport) -> None:
    worst = report.worst
    if worst:
        format_ = worst[0].format
        warnings.warn(
            f"{len(worst)} of {len(report.modules)} modules keep less than {ENOUGH:.0%} of their update in "
            f"{format_}, {worst[0].name} the least ({worst[0].share:.1%}); see report.table(), and use a format with "
            "more bits where the adapter's skill is gone",
            stacklevel=3,
        )
