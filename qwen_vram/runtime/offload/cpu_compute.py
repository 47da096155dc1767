"""Host layers: decoder layers whose matrix products the CPU computes.

They compute in steps of few rows. Attention, its cache and the rotary embedding stay on the device: queries, keys and
values are copied there, and the result is copied back. In a prefill the layer streams like other layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.runtime.offload.blocks import HostBlock


class HostLayer:
    """One host layer, with hooks on its modules that copy tensors between CPU and device.

    Attributes:
        active: The current step computes on the CPU.
    """

    def __init__(self, block: HostBlock, device: torch.device) -> None:
        self.block = block
        self.device = device
        self.active = False
        self._modules = set(block.modules)
        attention: Any = block.layer.self_attn
        last = [getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj") for name in "qkv"]
        self._hooks = [module.register_forward_hook(self._to_device) for module in last]
        self._hooks.append(attention.o_proj.register_forward_pre_hook(self._to_host))

    def enter(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Begin a step on the CPU: return the layer's inputs with the hidden states there."""
        self.active = True
        self.block.bind_computing()
        return (inputs[0].to("cpu"), *inputs[1:])

    def leave(self, output: Tensor) -> Tensor:
        """End the step: return the layer's result on the device."""
        self.active = False
        self.block.stop_computing()
        return output.to(self.device)

    def is_whole(self) -> bool:
        """Tell if all modules with weights came with the layer; those of an adapter compute on the device."""
        return all(
            module in self._modules or not any(True for _ in module.parameters(recurse=False))
            for module in self.block.layer.modules()
        )

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _to_device(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self.device) if self.active else output

    def _to_host(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].to("cpu"), *inputs[1:]) if self.active else inputs
