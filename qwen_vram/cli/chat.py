"""`qwen-vram chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.consoles import console, errors
from qwen_vram.cli.options import (
    Adapter,
    Knobs,
    Model,
    NewTokens,
    Prefer,
    PromptLen,
    Ram,
    Reserve,
    Vram,
    budgets,
    parsed_knobs,
)


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
    adapter: Adapter = None,
    knobs: Knobs = None,
) -> None:
    """Talk to a model; Ctrl-C stops an answer, Ctrl-D leaves, /report compares memory with the prediction."""
    with qv.load(
        model,
        profile=profile,
        vram=budgets(vram),
        ram=ram,
        reserve=reserve,
        prefer=prefer,  # type: ignore[arg-type]
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        **parsed_knobs(knobs),
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
