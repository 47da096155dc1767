"""Modules of a checkpoint that bitsandbytes quantized, filled on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from qwen_vram.runtime.backends.dense import filled

_SCALES = "SCB"


def restored(module: nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Return `module`, filled with its tensors from the checkpoint.

    Args:
        tensors: Codes, bias and quantization state under bitsandbytes' names, on the host.
        dtype: Biases and other float32 tensors that are not quantized are cast to it. The rest keeps its dtype, as in
            `transformers`.
    """
    made: Any = module
    plain = {name: tensors[name] for name, _ in module.named_parameters(recurse=False)}
    if isinstance(module, Linear4bit):
        state = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
        made.weight = Params4bit.from_prequantized(plain.pop("weight"), state, device="cpu", module=module)
    elif isinstance(module, Linear8bitLt):
        codes = plain.pop("weight")
        made.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=tensors[_SCALES])
    for name, tensor in plain.items():
        filled(module, {name: tensor}, dtype if name == "bias" or tensor.dtype == torch.float32 else tensor.dtype)
    return module
