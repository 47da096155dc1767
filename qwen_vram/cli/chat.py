"""`qwen-vram chat`: a conversation with a model in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

import qwen_vram as qv
from qwen_vram.cli.consoles import console, errors
from qwen_vram.cli.options import (
    Adapter,
    Model,
    NewTokens,
    Prefer,
    PromptLen,
    Ram,
    Reserve,
    Settings,
    Vram,
    budgets,
    parsed_settings,
)

_COMMANDS = "/clear begins a new conversation, /report compares memory with the prediction, /exit leaves"


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
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this sum.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens; 0 is all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer with this text; may be repeated.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="enable_thinking of the chat template.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="Name of one of several chat templates.")] = None,
    adapter: Adapter = None,
    settings: Settings = None,
) -> None:
    """Talk to a model; Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands."""
    from qwen_vram.runtime.requests.prompts import check_chat

    knobs, options = parsed_settings(settings)
    options |= _given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_strings=stop or None,
        enable_thinking=thinking,
        chat_template=chat_template,
    )
    check_chat(model, adapter, system, options)
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
        **knobs,
    ) as llm:
        first = [{"role": "system", "content": system}] if system else []
        if message is not None:
            _print(llm.stream([*first, {"role": "user", "content": message}], **options))
            return
        with llm.conversation(**options) as conversation:
            _converse(llm, conversation, first)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _converse(llm: qv.LoadedModel, conversation: qv.Conversation, first: list[dict[str, str]]) -> None:
    """Ask and answer until the input ends; each conversation begins with the messages of `first`."""
    console.print(f"{llm!r}; Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands", markup=False)
    conversation.messages = list(first)
    while True:
        try:
            question = console.input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/help":
            print(_COMMANDS)
        elif question == "/report":
            print(llm.report())
        elif question == "/clear":
            conversation.messages = list(first)
        elif question:
            _take_turn(conversation, question)


def _take_turn(conversation: qv.Conversation, question: str) -> None:
    """Answer a question; the conversation has both afterwards, unless the question is refused."""
    try:
        _print(conversation.stream(question))
    except qv.QwenVramError as error:
        full = isinstance(error, qv.DoesNotFitError) or getattr(error, "name", "") == "context_len"
        begun = any(one["role"] == "assistant" for one in conversation.messages)
        cure = "; type /clear to begin a new conversation" if full and begun else ""
        errors.print(f"error: {error}{cure}", style="red", markup=False, soft_wrap=True)


def _print(answer: Iterator[str]) -> None:
    """Print an answer as it is generated; Ctrl-C ends it."""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
