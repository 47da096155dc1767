"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any

import typer

import qwen_vram as qv
from qwen_vram.spec.profile import KNOBS

Model = Annotated[str, typer.Argument(help="Catalog name, checkpoint folder or hub id.")]
PromptLen = Annotated[int, typer.Option(help="Prompt tokens of one sequence.")]
NewTokens = Annotated[int, typer.Option(help="Tokens generated after it.")]
Concurrency = Annotated[
    int | None, typer.Option(help="Requests at once, which come and go independently; instead of --batch-size.")
]
BatchSize = Annotated[int, typer.Option(help="Sequences at once.")]
Padded = Annotated[bool, typer.Option("--padded", help="Prompts of a batch differ in length: count the mask.")]
Adapter = Annotated[str | None, typer.Option(help="Folder or hub id of a LoRA adapter that runs beside the model.")]
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
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Replace a knob of the profile, such as --set weights=nf4, or set an option of the chat template or of "
        "transformers' generate, such as --set repetition_penalty=1.1.",
    ),
]
CalibrationFile = Annotated[
    str | None, typer.Option(help="For gptq: sample texts, one on each line (.jsonl: in JSON), some hundred.")
]


def budgets(text: str | None) -> str | dict[int, str] | None:
    """Return `"8GiB"` unchanged, and `"0=20GiB,1=20GiB"` as a dict by device number."""
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


def parsed_settings(pairs: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that are knobs, and the others as options of the chat, with their values parsed as JSON."""
    knobs, options = [], {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name or name in KNOBS:
            knobs.append(pair)
            continue
        near = tuple(get_close_matches(name, KNOBS, n=2, cutoff=0.8))
        if near:
            raise qv.UnknownNameError(
                "knob", name, near, hint="options of the chat template and of generate are set too"
            )
        try:
            options[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            options[name] = value
    return parsed_knobs(knobs), options


def parsed_knobs(pairs: list[str] | None) -> dict[str, Any]:
    """Return `["weights=nf4", "prefill_chunk_size=512"]` as keyword arguments, with numbers and flags parsed."""
    words = {"true": True, "false": False, "none": None}
    knobs: dict[str, Any] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise qv.UnknownNameError("--set", pair, ("KNOB=VALUE",))
        if name not in KNOBS:
            raise qv.UnknownNameError("knob", name, tuple(KNOBS))
        lowered = value.lower()
        knobs[name] = int(value) if value.isdecimal() else words.get(lowered, value)
    return knobs
