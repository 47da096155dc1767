"""`qwen-vram fleet`: which GPUs, and how many, serve a number of users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.consoles import console, errors
from qwen_vram.cli.options import AsJson, Model

Length = int | tuple[int, int] | list[int]


def fleet(
    model: Model,
    gpus: Annotated[str, typer.Option(help="GPUs to compare, such as L4,A100-80GB, or how many there are: L4=4.")],
    users: Annotated[int, typer.Option(help="Users who wait for an answer at once.")],
    tokens_per_second: Annotated[float, typer.Option(help="Least rate of new tokens for each user.")],
    prompt_len: Annotated[str, typer.Option(help="Prompt tokens: a number, or a range such as 200-2000.")] = "512",
    max_new_tokens: Annotated[str, typer.Option(help="Tokens of an answer: a number, or a range.")] = "512",
    first_token_seconds: Annotated[float, typer.Option(help="Most seconds to the first token.")] = 2.0,
    share: Annotated[float, typer.Option(help="Least share of requests that get both.")] = 0.95,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    weights: Annotated[str | None, typer.Option(help="Formats of weights to compare, with commas.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs of one replica; default: searched.")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one machine.")] = 8,
    price: Annotated[
        list[str] | None, typer.Option(metavar="GPU=PRICE", help="Price of a GPU for an hour, such as L4=0.8.")
    ] = None,
    slowdown: Annotated[float, typer.Option(help="Factor of all predicted times, to plan with a margin.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the arrivals.")] = 0,
    compose: Annotated[Path | None, typer.Option(help="Write a Docker Compose file for the first machine.")] = None,
    kubernetes: Annotated[Path | None, typer.Option(help="Write a Deployment and a Service for Kubernetes.")] = None,
    image: Annotated[str | None, typer.Option(help="Image of the engine in these files, with its tag.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the fewest GPUs that serve a number of users, checked by a simulation."""
    for file in (compose, kubernetes):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise qv.WorkloadError(
                f"cannot write {str(file)!r}: it is a folder, or its folder is missing; name a file in a folder that "
                "exists",
                name="file",
                got=str(file),
            )
    with errors.status("planning"):
        result = qv.plan_fleet(
            model,
            _numbered(gpus),
            concurrent_users=users,
            tokens_per_second=tokens_per_second,
            prompt_len=_lengths(prompt_len, "--prompt-len"),
            max_new_tokens=_lengths(max_new_tokens, "--max-new-tokens"),
            first_token_seconds=first_token_seconds,
            share=share,
            engine=engine,  # type: ignore[arg-type]
            weights=tuple(weights.split(",")) if weights else None,
            tensor_parallel=tensor_parallel,
            gpus_per_node=gpus_per_node,
            prices=_prices(price),
            slowdown=slowdown,
            seed=seed,
        )
    texts = {}
    if compose is not None:
        texts[compose] = result.compose(image=image)
    if kubernetes is not None:
        texts[kubernetes] = result.kubernetes(image=image)
    for file, text in texts.items():
        _write(file, text)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    for file in texts:
        errors.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _numbered(text: str) -> list[str] | dict[str, int]:
    """Return `"L4,A10"` as a list, and `"L4=4,A10=2"` as a dict."""
    entries = [entry.strip() for entry in text.split(",")]
    if "=" not in text:
        return entries
    numbers: dict[str, int] = {}
    for entry in entries:
        name, _, count = entry.partition("=")
        if not count.strip().isdecimal():
            raise qv.WorkloadError(
                f"--gpus names GPUs, or a number for each such as L4=4,A10=2; got {text!r}", name="gpus", got=text
            )
        numbers[name.strip()] = int(count)
    return numbers


def _lengths(text: str, name: str) -> Length:
    """Return `"512"` as a number, and `"200-2000"` as a range."""
    parts = text.split("-")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise qv.WorkloadError(
            f"{name} must be a number of tokens, or a range such as 200-2000; got {text!r}", name=name, got=text
        )
    first, *rest = (int(part) for part in parts)
    return (first, rest[0]) if rest else first


def _prices(pairs: list[str] | None) -> dict[str, float] | None:
    """Return `["L4=0.8"]` as a dict."""
    prices: dict[str, float] = {}
    for pair in pairs or []:
        name, _, price = pair.partition("=")
        try:
            prices[name.strip()] = float(price)
        except ValueError:
            raise qv.WorkloadError(
                f"--price must be a GPU and its price for an hour, such as L4=0.8; got {pair!r}", name="price", got=pair
            ) from None
    return prices or None


def _write(file: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    beside = file.with_name(f".{file.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
