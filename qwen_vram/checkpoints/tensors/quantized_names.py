"""Recognition of a checkpoint's quantizer by the names and dtypes of its tensors.

Source of the names: each library's own module of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.dtypes import PLAIN, UINT32
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.quantization import AWQ, BLOCK_FP8, GPTQ

FLOATS = tuple(row.stored for row in PLAIN)
# The end of a tensor's name -> its quantizer; the first match counts.
_ENDS = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".qweight", GPTQ),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", BLOCK_FP8),
    (".scales_and_zeros", "qwen_vram"),
    (".weight_scale_2", "modelopt"),
    (".trellis", "exl3"),
    (".q_weight", "exl2"),
    (".W_q", "hqq"),
    (".codebooks", "aqlm"),
    (".centroids.weight", "vptq"),
    (".weight._data", "quanto"),
    (".weight_scales", "eetq"),
    (".weight_scale", "compressed-tensors"),
)
# Ends of most names, none of which is the end of a quantizer's.
_PLAIN = ("proj.weight", "norm.weight", "proj.bias")


def quantizer_of(tensors: Mapping[str, Tensor], architecture: Architecture) -> str:
    """Return the `quant_method` of the tensors: "unknown" for codes without a known method, empty for plain dtypes.

    AWQ packs along the rows of a matrix, and GPTQ along its columns, so the shape of the codes tells them apart.
    """
    ends = tuple(end for end, _ in _ENDS)
    named = [name for name in tensors if not name.endswith(_PLAIN) and name.endswith(ends)]
    for end, method in _ENDS:
        if any(name.endswith(end) for name in named):
            return AWQ if method == GPTQ and _is_awq(tensors, architecture) else method
    codes = [tensor for name, tensor in tensors.items() if name.endswith("proj.weight") and tensor.dtype not in FLOATS]
    if not codes:
        return ""
    if codes[0].dtype == UINT32.stored and any(name.endswith(".scales") for name in tensors):
        return "mlx"
    return "qwen_vram" if any(name.endswith("proj.scale") for name in tensors) else "unknown"


def _is_awq(tensors: Mapping[str, Tensor], architecture: Architecture) -> bool:
    for weight in architecture.weights():
        codes = tensors.get(f"{weight.name.removesuffix('.weight')}.qweight") if weight.is_linear else None
        if codes is not None and codes.shape:
            return codes.shape[0] == weight.shape[1]
    return False


def head_is_quantized(tensors: Mapping[str, Tensor]) -> bool:
    """Tell if the file has a separate head with codes, or with scales beside it."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("lm_head.")}
    return bool(own) and (set(own) > {"lm_head.weight"} or own["lm_head.weight"].dtype not in FLOATS)
