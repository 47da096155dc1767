"""Tensors of a live model: its matrices with their formats, and the bytes of its storages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.diagnosis.model_facts import Matrix, Role, name_of
from qwen_vram.runtime.torch_dtypes import ROWS

_LAYER = re.compile(r"\blayers\.\d+\.|\bh\.\d+\.")
_EXPERTS = re.compile(r"\bexperts\b")
_ADAPTER = re.compile(r"\blora_")


def dtype_name(dtype: torch.dtype) -> str:
    """Return this library's name of one of torch's dtypes, or torch's own."""
    row = ROWS.get(dtype)
    return str(dtype).removeprefix("torch.") if row is None else name_of(row)


def output_of(model: nn.Module) -> object:
    """The model's head; `None` if it has none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def matrices_of(model: nn.Module) -> Iterator[Matrix]:
    """Yield every weight of two or three dimensions, once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full, role = f"{module_name}.{name}", _role(module_name, module, model)
            state = getattr(parameter, "quant_state", None)
            if state is not None and hasattr(state, "nested"):
                yield _coded(full, role, parameter, state, module)
            elif parameter.dim() in (2, 3):
                yield Matrix(
                    name=full,
                    shape=tuple(parameter.shape),
                    nbytes=sum(one.nbytes for one in _parts(parameter)),
                    dtype=dtype_name(parameter.dtype),
                    role=role,
                    is_dense=_is_dense(parameter),
                )


def _role(name: str, module: nn.Module, model: nn.Module) -> Role:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module is output_of(model):
        return "head"
    if _ADAPTER.search(name):
        return "adapter"
    if _EXPERTS.search(name):
        return "experts"
    if name.endswith((".gate", ".router")) or "Router" in type(module).__name__:
        return "router"
    return "layer" if _LAYER.search(name) else "other"


def _is_dense(tensor: Tensor) -> bool:
    """Tell if a tensor's elements are numbers of 16 or 32 bits, and no codes."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and not _is_wrapper(tensor)


def _is_wrapper(tensor: Tensor) -> bool:
    """Tell if a tensor is made of others, as torchao's quantized ones are."""
    return hasattr(tensor, "__tensor_flatten__")


def _coded(name: str, role: Role, parameter: Tensor, state: Any, module: nn.Module) -> Matrix:
    """A 4-bit matrix of bitsandbytes.

    Its scales count as double quantized if its first product on the CPU has repacked them.
    Source: bitsandbytes 0.50.2, functional.py (_convert_weight_packed_for_cpu).
    """
    compute = getattr(module, "compute_dtype", None)
    return Matrix(
        name=name,
        shape=tuple(state.shape),
        nbytes=parameter.nbytes + sum(one.nbytes for one in _state_tensors(state)),
        dtype=dtype_name(state.dtype),
        role=role,
        codes=str(state.quant_type),
        is_dense=False,
        is_double=bool(state.nested or getattr(state, "packing_format_for_cpu", False)),
        compute_dtype="" if compute is None else dtype_name(compute),
    )


def _state_tensors(state: Any) -> Iterator[Tensor]:
    nested = getattr(state, "state2", None)
    for one in (state.absmax, state.code, getattr(state, "offset", None)):
        if isinstance(one, Tensor):
            yield one
    if nested is not None:
        yield from _state_tensors(nested)


def tensor_bytes(model: nn.Module, device: str = "") -> int:
    """Bytes of all parameters, quantization states and buffers. Each storage counts once.

    Args:
        device: Count tensors on this kind of device alone; offloaded ones then do not count.
    """
    seen: set[int] = set()
    total = 0
    for tensor in _tensors(model):
        if device and tensor.device.type != device:
            continue
        key = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
        if key not in seen:
            seen.add(key)
            total += tensor.nbytes if tensor.is_meta else tensor.untyped_storage().nbytes()
    return total


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield from _parts(parameter)
        state = getattr(parameter, "quant_state", None)
        if state is not None and hasattr(state, "absmax"):
            yield from _state_tensors(state)
        scales = getattr(parameter, "SCB", None)  # of bitsandbytes' int8
        if isinstance(scales, Tensor):
            yield scales
    for buffer in model.buffers():
        yield from _parts(buffer)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with storages that a tensor is made of: itself, unless it is a wrapper."""
    if not _is_wrapper(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _parts(getattr(tensor, name))
