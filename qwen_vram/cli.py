"""The command line: `qwen-vram estimate`, `plan`, `chat`, `merge`, `quantize`, `calibrate`, `demo`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import qwen_vram as qv
from qwen_vram.arithmetic import render
from qwen_vram.units import format_gib

app = typer.Typer(
    help="Run Qwen models in as little GPU memory as possible, and know the peak before you load.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Catalog name, checkpoint folder or hub id.")]
PromptLen = Annotated[int, typer.Option(help="Prompt tokens of one sequence.")]
NewTokens = Annotated[int, typer.Option(help="Tokens generated after it.")]
BatchSize = Annotated[int, typer.Option(help="Sequences at once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Vram = Annotated[
    str | None,
    typer.Option(
        help="Most that nvidia-smi may show, such as 8GiB, or of each of several GPUs, such as 0=20GiB,1=20GiB; "
        "default: what is free."
    ),
]
Reserve = Annotated[
    str | None, typer.Option(help="Kept free of it; default: 256MiB where --vram is left out, else nothing.")
]
Ram = Annotated[str | None, typer.Option(help="Most host memory; default: what is free.")]
Prefer = Annotated[str, typer.Option(help="quality, speed or memory.")]
Knobs = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KNOB=VALUE", help="Replace a knob of the profile, such as --set weights=nf4."),
]


CalibrationFile = Annotated[
    str | None, typer.Option(help="For gptq: sample texts, one on each line (.jsonl: in JSON), some hundred.")
]


def main() -> None:
    """Run the command line; a refusal is one line and exit status 2."""
    as_json = "--json" in sys.argv
    try:
        app()
    except qv.QwenVramError as error:
        if as_json:
            facts = {name: value for name, value in vars(error).items() if isinstance(value, (str, int, tuple, dict))}
            print(json.dumps({"error": type(error).__name__, "message": str(error), **facts}))
        else:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


def _vram(text: str | None) -> str | dict[int, str] | None:
    """`"8GiB"` as it is, `"0=20GiB,1=20GiB"` as a dict by device number."""
    if text is None or "=" not in text:
        return text
    sizes: dict[int, str] = {}
    for entry in text.split(","):
        device, separator, size = entry.partition("=")
        if not separator or not device.strip().isdecimal() or int(device) in sizes:
            raise qv.UnitError(
                f"--vram names a size for each GPU once, such as 0=20GiB,1=20GiB; got {text!r}", got=text
            )
        sizes[int(device)] = size
    return sizes


def _knobs(pairs: list[str] | None) -> dict[str, Any]:
    """`["weights=nf4", "prefill_chunk_size=512"]` as keyword arguments, numbers and flags read as such."""
    words = {"true": True, "false": False, "none": None}
    knobs: dict[str, Any] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise qv.UnknownNameError("--set", pair, ("KNOB=VALUE",))
        lowered = value.lower()
        knobs[name] = int(value) if value.isdigit() else words.get(lowered, value)
    return knobs


@app.command()
def estimate(
    model: Annotated[str | None, typer.Argument(help="Catalog name, checkpoint folder or hub id.")] = None,
    profile: Annotated[str, typer.Option(help=", ".join(qv.PROFILES))] = "default",
    prompt_len: PromptLen = 512,
    max_new_tokens: NewTokens = 512,
    batch_size: BatchSize = 1,
    params: Annotated[float | None, typer.Option(help="Instead of a model: parameters, for the rule of thumb.")] = None,
    knobs: Knobs = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model will take, part by part, without loading it."""
    result = qv.estimate_vram(
        model,
        profile,
        params=params,
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **_knobs(knobs),
    )
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        show_estimate(result)


@app.command()
def plan(
    model: Model,
    vram: Vram = None,
    ram: Ram = None,
    reserve: Reserve = None,
    profile: Annotated[str, typer.Option(help="auto, " + ", ".join(qv.PROFILES))] = "auto",
    prefer: Prefer = "quality",
    prompt_len: PromptLen = 512,
    max_new_tokens: NewTokens = 512,
    batch_size: BatchSize = 1,
    knobs: Knobs = None,
    as_json: AsJson = False,
) -> None:
    """Find the least lossy way to run a model within a budget."""
    result = qv.plan(
        model,
        profile=profile,
        vram=_vram(vram),
        ram=ram,
        reserve=reserve,
        prefer=prefer,  # type: ignore[arg-type]
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **_knobs(knobs),
    )
    room: dict[str, Any] = {"vram": result.budget.given, "ram": result.budget.ram}
    asked: dict[str, Any] = {**_knobs(knobs), "profile": profile, "max_new_tokens": max_new_tokens}
    limits = {
        "max_context": qv.max_context(model, **room, **asked, batch_size=batch_size),
        "max_batch": qv.max_batch(model, **room, **asked, prompt_len=prompt_len),
        "min_vram": qv.min_vram(model, **asked, prompt_len=prompt_len, batch_size=batch_size),
    }
    if as_json:
        print(json.dumps({**result.to_dict(), "limits": limits}))
        return
    show_steps(result)
    show_estimate(result.estimate)
    print(
        f"within {result.room}: at most {limits['max_context']:,} tokens a sequence at batch {batch_size}, or batch "
        f"{limits['max_batch']:,} at {result.workload.context_len:,} tokens\n"
        f"smallest card for this workload: {format_gib(limits['min_vram'])}"
    )
    print(result.call)


@app.command()
def chat(
    model: Model,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    vram: Vram = None,
    ram: Ram = None,
    reserve: Reserve = None,
    profile: Annotated[str, typer.Option(help="auto, " + ", ".join(qv.PROFILES))] = "auto",
    prefer: Prefer = "quality",
    prompt_len: PromptLen = 2048,
    max_new_tokens: NewTokens = 512,
    knobs: Knobs = None,
) -> None:
    """Talk to a model; Ctrl-C stops an answer, Ctrl-D leaves, /report compares memory with the prediction."""
    with qv.load(
        model,
        profile=profile,
        vram=_vram(vram),
        ram=ram,
        reserve=reserve,
        prefer=prefer,  # type: ignore[arg-type]
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        **_knobs(knobs),
    ) as llm:
        history = [{"role": "system", "content": system}] if system else []
        if message is not None:
            _say(llm, [*history, {"role": "user", "content": message}])
            return
        _converse(llm, history)


def _converse(llm: qv.LoadedModel, history: list[dict[str, str]]) -> None:
    """Questions and answers until the input ends."""
    console.print(f"{llm!r}; Ctrl-C stops an answer, Ctrl-D leaves, /report compares memory", markup=False)
    while True:
        try:
            question = console.input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "/report":
            print(llm.report())
        elif question:
            history.append({"role": "user", "content": question})
            try:
                history.append({"role": "assistant", "content": _say(llm, history)})
            except qv.QwenVramError as error:
                history.pop()
                errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)


def _say(llm: qv.LoadedModel, history: list[dict[str, str]]) -> str:
    """Print an answer as it is made; Ctrl-C keeps what was said so far."""
    pieces: list[str] = []
    try:
        for piece in llm.stream(history):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return "".join(pieces)


MERGED = (
    "nf4, nf4-plain, fp4, int8, or none for 16 bit; int4, int8-wo or fp8, which load with this library, not with plain "
    "transformers; gptq-int4 or gptq-int8 with --calibration."
)


@app.command()
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
        quantize=None if quantize == "none" else quantize,  # type: ignore[arg-type]
        calibration=calibration,
        device=device,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=not as_json,
    )
    print(json.dumps(report.to_dict()) if as_json else report)


def _weighted(entry: str) -> tuple[str, float]:
    """`"folder=0.5"` as a folder and its weight, 1 where there is none."""
    folder, separator, weight = entry.rpartition("=")
    if not separator:
        return entry, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise qv.UnknownNameError("weight in --also", weight, ("a number, such as 0.5",)) from None


@app.command()
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
    if weights in ("gptq-int4", "gptq-int8"):
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
            bits=int(weights[-1]),
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
    from qwen_vram.runtime.save import saving_backend

    saving_backend(weights)  # refuses before anything is loaded
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


@app.command()
def calibrate(
    show: Annotated[bool, typer.Option("--show", help="Print what is stored and where; measure nothing.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Delete what is stored; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this GPU's context size, copy rate and bandwidth once; estimates and plans use them from then on."""
    from qwen_vram.arithmetic import machine_file
    from qwen_vram.tools.calibrate import calibrate as measure

    if show and reset:
        raise typer.BadParameter("--show and --reset do not go together")
    if reset:
        path, deleted = machine_file.cache_file(), machine_file.reset()
        text = f"deleted {path}" if deleted else f"nothing was stored at {path}"
        print(json.dumps({"path": str(path), "deleted": deleted}) if as_json else text)
        return
    if not show:
        measure(say=lambda line: None if as_json else print(line, flush=True))
    _show_machines(as_json)


def _show_machines(as_json: bool) -> None:
    """What estimates use, where it is stored, and what else is."""
    from qwen_vram.arithmetic.machine import DEFAULT
    from qwen_vram.arithmetic.machine_file import cache_file, read

    stored = read()
    used = stored.machines[stored.current] if stored else DEFAULT
    others = [machine for machine in stored.machines.values() if machine != used] if stored else []
    if as_json:
        facts = {"path": str(cache_file()), "stored": stored is not None, "machine": asdict(used)}
        print(json.dumps({**facts, "others": [asdict(machine) for machine in others]}))
        return
    print(
        f"estimates use {cache_file()}" if stored else f"nothing stored at {cache_file()}; estimates use the defaults"
    )
    for machine in (used, *others):
        print(machine)


@app.command()
def demo() -> None:
    """Show the whole job offline: the article's numbers, the bundled model estimated, loaded, asked and measured."""
    from qwen_vram.demo.walkthrough import walk_through

    walk_through(console)


def show_estimate(result: qv.Estimate) -> None:
    """Print an estimate as a table."""
    table = Table()
    table.add_column("")
    for name in ("bytes", "GB (10^9)", "GiB (2^30)", "share"):
        table.add_column(name, justify="right")
    for label, size, share in render.rows(result):
        percent = "" if share is None else f"{share:.1%}"
        table.add_row(label, f"{size:,}", f"{size / 10**9:.2f}", f"{size / 2**30:.2f}", percent)
        if label == "workspace":
            table.add_section()
    console.print(render.headline(result), style="bold", soft_wrap=True, highlight=False)
    console.print(table)
    if result.devices:
        (corner, names), *rows = render.by_device(result)
        each = Table(corner, *names)
        for column in each.columns[1:]:
            column.justify = "right"
        for label, texts in rows:
            each.add_row(label, *texts)
        console.print(each)


def show_steps(result: qv.Plan) -> None:
    """Print a plan's search as a table, the chosen step last."""
    table = Table()
    table.add_column("step")
    table.add_column("needs (GiB)", justify="right")
    table.add_column("saves (GiB)", justify="right")
    table.add_column("cost")
    for step in result.steps:
        saves = f"{step.saved_bytes / 2**30:.2f}" if step.saved_bytes else ""
        table.add_row(step.change, f"{step.needed_bytes / 2**30:.2f}", saves, step.cost)
    console.print(f"plan for {result.estimate.model}, {result.room}", style="bold", soft_wrap=True, highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
