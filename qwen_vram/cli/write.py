"""`qwen-vram merge` and `quantize`: the commands that write checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.options import AsJson, CalibrationFile
from qwen_vram.spec.formats import FORMATS

MERGED = (
    "nf4, nf4-plain, fp4, int8, or none for 16 bit; int4, int8-wo or fp8, which load with this library, not with plain "
    "transformers; gptq-int4 or gptq-int8 with --calibration."
)


def merge(
    base: Annotated[str, typer.Argument(help="16-bit checkpoint: folder, catalog name or hub id.")],
    adapter: Annotated[str, typer.Argument(help="PEFT's adapter: folder or hub id.")],
    out: Annotated[str, typer.Argument(help="New folder for the merged checkpoint.")],
    quantize: Annotated[str, typer.Option(help=MERGED)] = "nf4",
    calibration: CalibrationFile = None,
    also: Annotated[
        list[str] | None, typer.Option("--also", metavar="ADAPTER[=WEIGHT]", help="A further adapter to add.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the GPU where there is one.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most tensor data in one file.")] = "4GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a LoRA adapter into its base in high precision, quantize it, and write a checkpoint ready to load."""
    adapters = [(adapter, 1.0), *(_weighted(entry) for entry in also or [])]
    report = qv.merge_lora_then_quantize(
        base,
        adapters,
        out,
        quantize=None if quantize.lower() == "none" else quantize,  # type: ignore[arg-type]
        calibration=calibration,
        device=device,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=not as_json,
    )
    print(json.dumps(report.to_dict()) if as_json else report)


def _weighted(entry: str) -> tuple[str, float]:
    """Return the folder and the weight of an entry such as `"folder=0.5"`; the weight is 1 if it is missing."""
    folder, separator, weight = entry.rpartition("=")
    if not separator:
        return entry, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise qv.UnknownNameError("weight in --also", weight, ("a number, such as 0.5",)) from None


def quantize(
    model: Annotated[str, typer.Argument(help="16-bit checkpoint: folder, catalog name or hub id.")],
    out: Annotated[str, typer.Argument(help="New folder for the quantized checkpoint.")],
    weights: Annotated[
        str, typer.Option(help="nf4, nf4-plain, fp4, int8, int4, int8-wo, fp8; gptq-int4 or gptq-int8 with texts.")
    ] = "nf4",
    lm_head: Annotated[str | None, typer.Option(help="The same, for the head too; default: 16 bit.")] = None,
    calibration: CalibrationFile = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the GPU where there is one.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most tensor data in one file.")] = "4GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint and write it: it loads in a fraction of the time, and without the 16-bit file."""
    storage = FORMATS.get(weights)
    if storage is not None and storage.needs_calibration:
        if lm_head is not None:
            raise qv.NotSupportedError(
                f"lm_head={lm_head!r} with weights={weights!r}: GPTQ leaves the head in 16 bits; leave --lm-head out",
                knob="lm_head",
                value=lm_head,
            )
        report = qv.quantize_gptq(
            model,
            out,
            calibration=calibration,  # type: ignore[arg-type]  # None is refused with what to pass
            bits=storage.bits,
            device=device,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=not as_json,
        )
        print(json.dumps(report.to_dict()) if as_json else report)
        return
    if calibration is not None:
        raise qv.WorkloadError(
            f"calibration: weights={weights!r} needs no sample texts, GPTQ does; leave --calibration out, or use "
            "--weights gptq-int4",
            name="calibration",
            got=calibration,
        )
    from qwen_vram.runtime.saving.save import check_output

    check_output(Path(out), model, weights=weights, max_shard_size=max_shard_size, overwrite=overwrite)
    with qv.load(
        model,
        profile="default",
        device=device,
        prompt_len=1,
        max_new_tokens=1,
        progress=not as_json,
        weights=weights,
        lm_head=lm_head,
        embeddings="host",
    ) as llm:
        report = llm.save_quantized(out, max_shard_size=max_shard_size, overwrite=overwrite, progress=not as_json)
    print(json.dumps(report.to_dict()) if as_json else report)
