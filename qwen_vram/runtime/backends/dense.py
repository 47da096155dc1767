"""bf16, fp16 and fp32: unquantized weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from qwen_vram.runtime.backends.base import Request, from_pretrained
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile


class DenseBackend:
    """The backend of plain dtypes, through `from_pretrained`."""

    name = "dense"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Accept every profile, because torch runs every plain dtype on every device."""

    def load(self, request: Request) -> nn.Module:
        """Return the model in its own dtype."""
        return from_pretrained(request)

    def build(self, module: nn.Module, weights: Mapping[str, torch.Tensor], request: Request) -> nn.Module:
        """Return `module` with its weights on the host."""
        return filled(module, weights, request.dtype)

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Return an empty list, because plain modules have only parameters."""
        return []

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the parameters."""
        return parameters(module)

    def binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Return a call that assigns the tensors to the parameters."""
        pairs = [(module.get_parameter(name), tensor) for name, tensor in tensors.items()]

        def bind() -> None:
            for parameter, tensor in pairs:
                parameter.data = tensor

        return bind

    def check_host(self, profile: Profile, architecture: Architecture) -> None:
        """Accept every profile, because torch multiplies every plain dtype on every CPU."""

    def host_binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Return a call that replaces the forward by that of a copy with these parameters."""
        return twin_binding(module, tensors)


def filled(module: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Return `module` with `weights` as its parameters, in `dtype`."""
    for name, tensor in weights.items():
        module.register_parameter(name, nn.Parameter(tensor.to(dtype), requires_grad=False))
    return module


def twin_binding(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """Return a call after which `module` computes with these tensors and keeps its own parameters."""
    twin = copy.copy(module)
    own = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    twin.__dict__["_parameters"] = {**module._parameters, **own}  # a missing bias is one of them
    forward = twin.forward

    def bind() -> None:
        module.forward = forward

    return bind


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's own parameters, by name."""
    return {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
