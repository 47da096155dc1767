"""Checks of kernels that are missing, so that slower operations run without a message."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.arithmetic.timing.generation import times_of
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes, of_ms
from qwen_vram.dtypes import FP32

# Versions of `kernels` that transformers accepts; it ignores others without a message, and loads no hub kernel.
# Source: transformers 5.23, utils/import_utils.py, KERNELS_MIN_VERSION and KERNELS_MAX_VERSION.
_KERNELS_FROM, _KERNELS_BELOW = (0, 18, 2), (0, 19)
_FLA = "pip install flash-linear-attention causal-conv1d"


def check_triton(subject: Subject) -> Iterator[Finding]:
    """Find a GPU machine on which Triton cannot compile, so that fused kernels are replaced by torch's operators."""
    machine = subject.machine
    if not machine.gpus or "torch" not in machine.versions:
        return
    if "triton" not in machine.versions:
        code, found, fix = "triton-missing", "Triton is not installed", "pip install triton"
    elif not machine.has_compiler:
        code, found, fix = "compiler-missing", "there is no C compiler, which Triton needs", "apt install gcc"
    else:
        return
    plain = times_of(subject.estimate(attention="fused", cache="preallocated", kernels="plain"), on_cpu=False)
    fused = times_of(
        subject.estimate(attention="fused", cache="preallocated", kernels="fused", captured=True), on_cpu=False
    )
    ms = plain.ms_per_token - fused.ms_per_token
    if ms > 0:
        yield of_ms(
            code,
            ms,
            found=f"{found}: fused kernels and captured decode steps are replaced by torch's operators",
            cost=f"for each token, by this library's times for {fused.place}",
            fix=fix,
        )


def check_linear_attention(subject: Subject) -> Iterator[Finding]:
    """Find linear attention on a GPU that runs in plain torch, in float32."""
    model, versions = subject.model, subject.machine.versions
    if not model.linear_layers or not model.on_gpu or "flash-linear-attention" in versions:
        return
    tokens = subject.rows
    heads = model.number("linear_num_value_heads")
    # Queries and keys are repeated for each value head; with values they are copied to float32.
    width = heads * (2 * model.number("linear_key_head_dim") + model.number("linear_value_head_dim"))
    cost = tokens * width * FP32.nbytes
    if cost:
        yield of_bytes(
            "linear-attention-torch",
            cost,
            of=subject.own,
            found=f"flash-linear-attention is not installed, so {model.linear_layers} layers run in plain torch"
            + _hub(subject),
            cost=f"for float32 copies of queries, keys and values of {tokens:,} tokens",
            fix=_FLA,
        )


def _hub(subject: Subject) -> str:
    release = subject.machine.release("kernels")
    if release is None or _KERNELS_FROM <= release < _KERNELS_BELOW:
        return ""
    version = subject.machine.versions["kernels"]
    return f"; transformers ignores kernels {version} without a message, and takes 0.18.2 or newer, below 0.19"


CHECKS = (check_triton, check_linear_attention)
