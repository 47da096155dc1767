"""Libraries that quantize checkpoints, by `quant_method`, with what loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qwen_vram.spec.quantization import BITSANDBYTES, method_of, settings_of, wrong_settings
from qwen_vram.units import format_bytes


class Quantizer(NamedTuple):
    """A library's format: its usual name, and the programs that run it."""

    name: str
    runs: str


# By `quant_method`, or by the format of the tensors if config.json names no method.
QUANTIZERS: dict[str, Quantizer] = {
    "auto-round": Quantizer("AutoRound", "vLLM, or transformers with auto-round"),
    "hqq": Quantizer("HQQ", "transformers with the package hqq"),
    "exl2": Quantizer("ExLlamaV2 (EXL2)", "ExLlamaV2 or TabbyAPI"),
    "exl3": Quantizer("ExLlamaV3 (EXL3)", "ExLlamaV3 or TabbyAPI"),
    "aqlm": Quantizer("AQLM", "transformers with the package aqlm"),
    "mlx": Quantizer("MLX", "mlx-lm on a Mac"),
    "quanto": Quantizer("Quanto", "transformers with optimum-quanto"),
    "torchao": Quantizer("torchao", "transformers with torchao, or vLLM"),
    "fp8": Quantizer("block-wise fp8", "vLLM, SGLang, or transformers"),
    "fbgemm_fp8": Quantizer("FBGEMM fp8", "vLLM, or transformers with fbgemm-gpu"),
    "compressed-tensors": Quantizer("compressed-tensors", "vLLM, or transformers with compressed-tensors"),
    "modelopt": Quantizer("NVIDIA ModelOpt", "vLLM or TensorRT-LLM"),
    "eetq": Quantizer("EETQ", "transformers with the package eetq"),
    "vptq": Quantizer("VPTQ", "transformers with the package vptq"),
    "gptq": Quantizer("GPTQ", ""),
    "awq": Quantizer("AWQ", ""),
    "bitsandbytes": Quantizer("bitsandbytes", ""),
    "qwen_vram": Quantizer("qwen_vram", ""),
}


def not_loaded(quantization: object, method: str, nbytes: int | None) -> str:
    """The reason why a checkpoint of another quantizer is refused, programs that run it, and formats that load here.

    Args:
        nbytes: Bytes of its tensors, if the headers were read.
    """
    wrong = wrong_settings(quantization)
    if wrong:
        return wrong
    if method == BITSANDBYTES:
        return (
            f"bnb_4bit_quant_type is {settings_of(quantization).get('bnb_4bit_quant_type')!r}, and bitsandbytes writes "
            "nf4 or fp4; set the one that the tensors are in"
        )
    known = QUANTIZERS.get(method)
    name = f"{known.name} ({method!r})" if known else repr(method)
    runs = known.runs if known else "the library that made it"
    size = f", in {nbytes:,} bytes ({format_bytes(nbytes)})" if nbytes else ""
    ways = "use the 16-bit checkpoint, or one by GPTQ, AWQ or bitsandbytes"
    return (
        f"the checkpoint is quantized by {name}{size}, which is not loaded here; run it with {runs}, or {ways}"
        f"{_auto_round(settings_of(quantization)) if method == 'auto-round' else ''}"
    )


def _auto_round(settings: Mapping[str, object]) -> str:
    """Advice for a checkpoint of AutoRound. Source: vLLM, quantization/auto_round.py, which loads it as GPTQ."""
    packing = str(settings.get("packing_format", "")).removeprefix("auto_round:")
    change = {"auto_gptq": 'quant_method to "gptq"', "auto_awq": 'quant_method to "awq" and version to "gemm"'}
    if packing not in change or settings.get("extra_config"):
        return ". AutoRound's export with format='auto_gptq' and one setting for all layers loads here"
    return f". Its tensors are in the layout of {packing}: set {change[packing]} in quantization_config, and it loads"


def method_name(quantization: object) -> str:
    """The method that a block names, for texts."""
    named = method_of(quantization)
    return named if named is not None else str(settings_of(quantization) or quantization)
