"""The quantization state that bitsandbytes keeps beside the codes of a matrix."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def quantization_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that bitsandbytes keeps beside the codes of a matrix, by name."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found = {"absmax": state.absmax, "code": state.code}
        if state.nested:
            found |= {"offset": state.offset, "state2.absmax": state.state2.absmax, "state2.code": state.state2.code}
        return found
    scales = getattr(weight, "SCB", None)
    if scales is None:  # from the first product on
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return {"SCB": scales} if isinstance(scales, torch.Tensor) else {}


def with_tensors(state: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return a `QuantState` like `state` with other tensors."""
    made = copy.copy(state)
    made.absmax, made.code = tensors["absmax"], tensors["code"]
    if state.nested:
        made.offset, made.state2 = tensors["offset"], copy.copy(state.state2)
        made.state2.absmax, made.state2.code = tensors["state2.absmax"], tensors["state2.code"]
    return made


def copied(state: Any) -> Any:
    """Return a `QuantState` that may change, with a reference to the one that does not; see `bnb_cpu`."""
    made = copy.copy(state)
    made.before_packing = state
    return made


def itself(state: Any) -> Any:
    """Return `state` unchanged."""
    return state
