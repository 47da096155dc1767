"""Checks of weights: their dtype, their quantization, and copies of them."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes
from qwen_vram.diagnosis.model_facts import Matrix, dtype_bytes
from qwen_vram.spec.formats import FORMATS
from qwen_vram.units import format_bytes

_NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    "bnb_4bit_compute_dtype=torch.bfloat16)"
)
# Weights are quantized for memory alone: it is reported if the model needs more than this share of the device.
_CROWDED = 0.5


def check_fp32(subject: Subject) -> Iterator[Finding]:
    """Find matrices in 32 bits."""
    wide = [matrix for matrix in subject.model.matrices if matrix.is_fp32 and matrix.role != "adapter"]
    cost = sum(matrix.nbytes for matrix in wide) // 2
    if subject.matters(cost):
        yield of_bytes(
            "weights-fp32",
            cost,
            of=subject.own,
            found=f"{len(wide)} matrices are in float32, {format_bytes(2 * cost)}",
            cost="more than in 16 bits",
            fix='from_pretrained(..., dtype="auto"), or dtype=torch.bfloat16',
        )


def check_16bit(subject: Subject) -> Iterator[Finding]:
    """Find unquantized layers of a model that needs most of its device."""
    model = subject.model
    if model.is_quantized or subject.own < _CROWDED * subject.memory:
        return
    layers = [matrix for matrix in model.matrices if matrix.is_dense and matrix.role in ("layer", "experts")]
    in_16_bits = sum(2 * matrix.numel for matrix in layers)
    # On a CPU without the kernel, 4-bit weights are slower than 16-bit ones, and 8-bit ones are faster.
    slow = not subject.machine.gpus and not subject.machine.has_4bit_kernel
    cost = in_16_bits - sum(matrix.numel if slow else matrix.nf4_bytes for matrix in layers)
    nf4 = f'qv.load(model, weights="nf4"), or from_pretrained(..., quantization_config={_NF4})'
    if subject.matters(cost):
        share = subject.own / subject.memory
        yield of_bytes(
            "weights-16bit",
            cost,
            of=subject.own,
            found=f"no matrix is quantized, and the model needs {share:.0%} of the {format_bytes(subject.memory)} here",
            cost="more than in 8-bit codes" if slow else "more than in NF4 with double quantization",
            fix='qv.load(model, weights="int8-wo")' if slow else nf4,
        )


def check_compute_dtype(subject: Subject) -> Iterator[Finding]:
    """Find 4-bit matrices that compute in another dtype than the model."""
    model, rows = subject.model, subject.rows
    other = [one for one in model.matrices if one.codes and one.compute_dtype not in ("", model.dtype)]
    if not other:
        return
    cost = max(_conversion(one, model.element_bytes, rows) for one in other)
    name = other[0].compute_dtype
    yield of_bytes(
        "compute-dtype",
        cost,
        of=subject.own,
        found=f"{len(other)} 4-bit matrices compute in {name}, and the model in {model.dtype}",
        cost=f"for input, result and matrix in {name}, in the largest product of {rows:,} rows",
        fix=f"BitsAndBytesConfig(..., bnb_4bit_compute_dtype=model.dtype), here {model.dtype}",
    )


def _conversion(matrix: Matrix, element: int, rows: int) -> int:
    """Bytes that a product's peak gains by another compute dtype.

    The converted input and the result exist beside the dequantized matrix, and then beside the result in the model's
    dtype. Without a conversion there are the matrix and the result alone.
    Source: bitsandbytes 0.50.2, nn/modules.py (Linear4bit.forward).
    """
    inner = dtype_bytes(matrix.compute_dtype)
    result, converted = matrix.shape[0] * rows, matrix.shape[-1] * rows * inner
    most = converted + result * inner + max(matrix.numel * inner, result * element)
    return most - matrix.numel * element - result * element


def check_experts(subject: Subject) -> Iterator[Finding]:
    """Find fused experts that a quantizer left in 16 bits."""
    model = subject.model
    if not model.is_quantized:
        return
    left = [one for one in model.matrices if one.role == "experts" and one.is_dense]
    cost = sum(one.nbytes - one.nf4_bytes for one in left)
    if subject.matters(cost):
        yield of_bytes(
            "experts-16bit",
            cost,
            of=subject.own,
            found=f"the experts are {format_bytes(sum(one.nbytes for one in left))} in {left[0].dtype}: "
            "bitsandbytes quantizes nn.Linear alone, and these are fused parameters",
            cost="more than in NF4 with double quantization",
            fix="load a checkpoint whose experts are stored quantized (GPTQ, AWQ or FP8)",
        )


def check_left_out(subject: Subject) -> Iterator[Finding]:
    """Find linear layers that a quantizer was told to leave out; the head is left out by default."""
    model = subject.model
    if not model.is_quantized:
        return
    left = [one for one in model.matrices if one.role == "layer" and one.is_dense]
    cost = sum(one.nbytes - one.nf4_bytes for one in left)
    if subject.matters(cost):
        yield of_bytes(
            "linear-16bit",
            cost,
            of=subject.own,
            found=f"{len(left)} matrices of the layers are not quantized, {left[0].name} the first",
            cost="more than in NF4 with double quantization",
            fix="remove these modules from llm_int8_skip_modules (modules_to_not_convert) and load again",
        )


def check_double(subject: Subject) -> Iterator[Finding]:
    """Find 4-bit scales that are not quantized."""
    plain = [one for one in subject.model.matrices if one.codes and not one.is_double]
    cost = sum(
        FORMATS[f"{one.codes}-plain"].nbytes((one.numel,)) - FORMATS[one.codes].nbytes((one.numel,)) for one in plain
    )
    if subject.matters(cost):
        yield of_bytes(
            "double-quantization",
            cost,
            of=subject.own,
            found=f"the scales of {len(plain)} 4-bit matrices are float32",
            cost="more than with double quantization",
            fix="BitsAndBytesConfig(..., bnb_4bit_use_double_quant=True)",
        )


def check_head(subject: Subject) -> Iterator[Finding]:
    """Find a head that should be the embedding's own tensor."""
    cost = subject.model.head_copy
    if subject.matters(cost):
        yield of_bytes(
            "head-copy",
            cost,
            of=subject.own,
            found="config.json ties the head to the embedding, and the head has a tensor of its own",
            cost="for the second tensor",
            fix="model.tie_weights()",
        )


def check_gradients(subject: Subject) -> Iterator[Finding]:
    """Find gradients that are still allocated."""
    cost = subject.model.gradients
    if subject.matters(cost):
        yield of_bytes(
            "gradients",
            cost,
            of=subject.own,
            found="parameters hold gradients",
            cost="of gradients, which generation does not use",
            fix="model.zero_grad(set_to_none=True), then model.requires_grad_(False)",
        )


CHECKS = (
    check_fp32,
    check_16bit,
    check_compute_dtype,
    check_experts,
    check_left_out,
    check_double,
    check_head,
    check_gradients,
)
