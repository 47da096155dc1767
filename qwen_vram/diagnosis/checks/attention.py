"""Checks of attention: its implementation, its kernel, and copies that masks cause."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes
from qwen_vram.planning.capacity.hardware import AMPERE

_FLASH = 'model.set_attn_implementation("flash_attention_2") with flash-attn installed, or qv.load(...)'
# Kernels of torch that need neither the matrix of scores nor copies for grouped heads.
_FLASH_LIKE = ("FLASH_ATTENTION", "CUDNN_ATTENTION")
_SCORES = "MATH"


def check_eager(subject: Subject) -> Iterator[Finding]:
    """Find eager attention, which holds the matrix of scores."""
    if subject.model.attention != "eager":
        return
    cost = subject.saved({"attention": "eager"}, {"attention": "sdpa"})
    if subject.matters(cost):
        yield of_bytes(
            "attention-eager",
            cost,
            of=subject.own,
            found='attn_implementation is "eager"',
            cost=f"for scores and their softmax, at {subject.workload.prompt_len:,} prompt tokens",
            fix='model.set_attn_implementation("sdpa")',
        )


def check_kernel(subject: Subject) -> Iterator[Finding]:
    """Find sdpa that runs without a flash kernel, with the reason."""
    model = subject.model
    if model.attention != "sdpa" or not model.sdpa_backend or model.sdpa_backend in _FLASH_LIKE:
        return
    if model.sdpa_backend == _SCORES:
        cost = subject.saved({"attention": "eager"}, {"attention": "sdpa"})
        for_what = f"for scores and their softmax, at {subject.workload.prompt_len:,} prompt tokens"
    elif model.heads > model.kv_heads:
        cost, for_what = _repeated(subject), "for keys and values that are copied for each query head"
    else:
        return  # the memory-efficient kernel needs no copies without grouped heads
    if subject.matters(cost):
        kernel = model.sdpa_backend.lower().replace("_", " ")
        yield of_bytes(
            "attention-no-flash",
            cost,
            of=subject.own,
            found=f"sdpa runs torch's {kernel} kernel, because {model.sdpa_reason or 'torch refuses the flash kernel'}",
            cost=for_what,
            fix=_fix_of(model.sdpa_reason),
        )


def _fix_of(reason: str) -> str:
    if "switched off" in reason:
        return "torch.backends.cuda.enable_flash_sdp(True)"
    if "float32" in reason:
        return 'from_pretrained(..., dtype="auto"), or dtype=torch.bfloat16'
    return "set prefill_chunk_size=512 in model.generation_config, which bounds the scores"


def _repeated(subject: Subject) -> int:
    """Bytes of one layer's keys and values, copied for each query head."""
    model, lengths = subject.model, subject.workload
    return 2 * lengths.batch_size * lengths.context_len * model.heads * model.head_dim * model.element_bytes


def check_masks(subject: Subject) -> Iterator[Finding]:
    """Find masks, for which sdpa copies keys and values for each query head."""
    model = subject.model
    if model.attention != "sdpa" or model.heads <= model.kv_heads:
        return
    chunk = model.generation.chunk
    if subject.workload.padded:
        cost = subject.saved({"padded": True}, {"padded": False})
        found, fix = "prompts of a batch are padded", "batch prompts of equal length, or pass them one by one"
    elif "static" in model.generation.cache and chunk:
        cost = subject.saved({"cache": "static"}, {"cache": "preallocated"})
        found = f"each chunk of {chunk:,} tokens attends the whole static cache, under a mask"
        fix = "model.generation_config.cache_implementation = None, or qv.load(...) with a preallocated cache"
    elif model.on_gpu and _is_new(subject) and chunk and chunk < subject.workload.prompt_len:
        cost = subject.saved({}, {"attention": "fused"})
        found, fix = f"each chunk of {chunk:,} tokens after the first has a mask", _FLASH
    else:
        return
    if subject.matters(cost):
        yield of_bytes(
            "mask-copies",
            cost,
            of=subject.own,
            found=f"{found}: sdpa then copies keys and values for each of {model.heads} heads",
            cost="for masks and copies",
            fix=fix,
        )


def _is_new(subject: Subject) -> bool:
    """Tell if the GPU runs flash kernels."""
    gpus = subject.machine.gpus
    return bool(gpus) and (gpus[0].capability or AMPERE) >= AMPERE


CHECKS = (check_eager, check_kernel, check_masks)
