"""`qwen-vram estimate` and `plan`: predictions, without loading a model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import qwen_vram as qv
from qwen_vram.cli.consoles import errors
from qwen_vram.cli.options import (
    Adapter,
    AsJson,
    BatchSize,
    Concurrency,
    Knobs,
    Model,
    NewTokens,
    Padded,
    Prefer,
    PromptLen,
    Ram,
    Reserve,
    Vram,
    budgets,
    parsed_knobs,
)
from qwen_vram.cli.show import show_estimate, show_steps
from qwen_vram.cli.vllm import PipelineParallel, TensorParallel, VllmCheckpoint
from qwen_vram.units import format_gib


def estimate(
    model: Annotated[str | None, typer.Argument(help="Catalog name, checkpoint folder or hub id.")] = None,
    profile: Annotated[str, typer.Option(help=", ".join(qv.PROFILES))] = "default",
    prompt_len: PromptLen = 512,
    max_new_tokens: NewTokens = 512,
    batch_size: BatchSize = 1,
    padded: Padded = False,
    concurrency: Concurrency = None,
    adapter: Adapter = None,
    params: Annotated[float | None, typer.Option(help="Instead of a model: parameters, for the rule of thumb.")] = None,
    knobs: Knobs = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory of a model, part by part, without loading it."""
    result = qv.estimate_vram(
        model,
        profile,
        params=params,
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        padded=padded,
        concurrency=concurrency,
        adapter=adapter,
        **parsed_knobs(knobs),
    )
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        show_estimate(result)
        if concurrency is not None:
            print(_at_once(concurrency))


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
    padded: Padded = False,
    concurrency: Concurrency = None,
    adapter: Adapter = None,
    knobs: Knobs = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Print the command of vLLM for the plan, with notes.")] = False,
    vllm_checkpoint: VllmCheckpoint = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    nodes: Annotated[int, typer.Option(help="With --vllm: machines, each with the plan's GPUs.")] = 1,
    node_rank: Annotated[int, typer.Option(help="With --vllm: the number of this machine.")] = 0,
    master_addr: Annotated[str | None, typer.Option(help="With --vllm: the address of the first machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the least lossy profile that runs a model within a budget."""
    options: dict[str, Any] = {
        "checkpoint": vllm_checkpoint,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "nodes": nodes,
        "node_rank": node_rank,
        "master_addr": master_addr,
    }
    others = [name for name, value in options.items() if value not in (None, 0) and (name, value) != ("nodes", 1)]
    if others and not vllm:
        name = "--vllm-checkpoint" if others[0] == "checkpoint" else f"--{others[0].replace('_', '-')}"
        raise qv.WorkloadError(f"{name} is for vLLM alone; add --vllm, or leave it out", name=others[0], got=False)
    with errors.status("planning"):  # seconds, or minutes if every chunk has its own mask
        result = qv.plan(
            model,
            profile=profile,
            vram=budgets(vram),
            ram=ram,
            reserve=reserve,
            prefer=prefer,  # type: ignore[arg-type]
            prompt_len=prompt_len,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            padded=padded,
            concurrency=concurrency,
            adapter=adapter,
            **parsed_knobs(knobs),
        )
        served = result.to_vllm(**options) if vllm else None
        budget: dict[str, Any] = {"vram": result.budget.given, "ram": result.budget.ram}
        asked = {**parsed_knobs(knobs), "profile": profile, "max_new_tokens": max_new_tokens, "adapter": adapter}
        batch: dict[str, Any] = {"batch_size": batch_size, "padded": padded, "concurrency": concurrency}
        limits: dict[str, Any] = {
            "max_context": qv.max_context(model, **budget, **asked, **batch),
            "max_batch": qv.max_batch(model, **budget, **asked, prompt_len=prompt_len, padded=padded),
            "max_concurrency": _max_concurrency(model, **budget, **asked, prompt_len=prompt_len),
            "min_vram": qv.min_vram(model, **asked, **batch, prompt_len=prompt_len),
        }
    if as_json:
        more = {} if served is None else {"vllm": served.to_dict()}
        print(json.dumps({**result.to_dict(), "limits": limits, **more}))
        return
    show_steps(result)
    show_estimate(result.estimate)
    print("\n".join(result.notes))
    batch_text = f"at batch {batch_size}" if concurrency is None else f"with {_at_once(concurrency)}"
    together = limits["max_concurrency"]
    requests = f", or {_at_once(together)}" if together else ""
    print(
        f"within {result.budget_text}: at most {limits['max_context']:,} tokens a sequence {batch_text}, or "
        f"batch {limits['max_batch']:,}{requests} at {result.workload.context_len:,} tokens\n"
        f"smallest card for this workload, if the host holds the rest: {format_gib(limits['min_vram'])}"
    )
    print(result.call)
    if served is not None:
        print(f"\nin vLLM:\n{served}")


def _at_once(number: int) -> str:
    return f"{number:,} request{'s' * (number > 1)} at once"


def _max_concurrency(model: str, **asked: Any) -> int | None:
    """Return `qv.max_concurrency`, or `None` if these settings do not allow requests at once."""
    try:
        return qv.max_concurrency(model, **asked)
    except (qv.NotSupportedError, qv.WorkloadError):
        return None
