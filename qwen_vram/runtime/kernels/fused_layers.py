"""`kernels="fused"`: decoder layers with fused norms, rotary embedding and SwiGLU.

The modules stay `transformers`' own, with weights and hooks. Each gets a forward of the same arithmetic that allocates
fewer tensors. A family names the classes with this arithmetic, because another class may compute something else. Their
own forward runs for gradients, and while torch compiles.

Source of the arithmetic: transformers 5.17 and 5.23, the modeling files of the families.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_vram.errors import NotSupportedError
from qwen_vram.runtime.kernels import fused_ops
from qwen_vram.spec.families import find_family, model_types
from qwen_vram.spec.family import FusedPart


def fuse_layers(model: nn.Module) -> None:
    """Give every decoder layer of a model, and its last norm, the fused forward.

    Raises:
        NotSupportedError: the model has no class that its family names, which is possible with another package's
            backend.
    """
    config: Any = getattr(model, "config", None)
    family = find_family(str(getattr(config, "model_type", "")))
    parts = {} if family is None else family.fused
    for module in model.modules():
        kind: Any = type(module)
        part = parts.get(f"{kind.__module__}.{kind.__qualname__}")
        if part is not None and not issubclass(kind, _FUSED[part]):
            module.__class__ = _joined_class(kind, _FUSED[part])
    if not any(isinstance(module, FusedLayer) for module in model.modules()):
        raise NotSupportedError(
            f"kernels='fused' knows the decoder layers of transformers' {', '.join(model_types())}, and "
            f"{type(model).__name__} has none; use kernels='plain'",
            knob="kernels",
            value="fused",
        )


@lru_cache(maxsize=64)
def _joined_class(kind: Any, fused: type) -> type:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (fused, kind), names)


def _plain(states: Tensor) -> bool:
    grad = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return grad or torch.is_autocast_enabled(states.device.type)


class FusedNorm:
    """RMSNorm in one kernel."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Return the norm of (..., width), in the same shape."""
        if _plain(hidden_states) or self.weight.dtype != hidden_states.dtype:
            result: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return result
        return fused_ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedMlp:
    """SwiGLU whose product is stored in the gate's memory."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the result for (..., hidden_size), in the same shape."""
        if _plain(x):
            plain: Tensor = super().forward(x)  # type: ignore[misc]
            return plain
        result: Tensor = self.down_proj(fused_ops.multiply_silu(self.gate_proj(x), self.up_proj(x)))
        return result


class FusedAttention:
    """Attention with queries and keys that are rotated in place."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result for (batch, tokens, hidden_size) in the same shape, and weights as eager attention."""
        if _plain(hidden_states):
            plain: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return plain
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim)
        query = self.q_norm(query) if hasattr(self, "q_norm") else query
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim)
        key = self.k_norm(key) if hasattr(self, "k_norm") else key
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim)
        fused_ops.rotate(query, key, *position_embeddings)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = _attention_function(self.config._attn_implementation, type(self))
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
        return self.o_proj(attended.reshape(*shape, -1).contiguous()), weights


class FusedLayer:
    """A decoder layer that adds each residual in place, into the newer term."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the result for (batch, tokens, hidden_size), in the same shape."""
        if args or _plain(hidden_states):
            plain: Tensor = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            return plain
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        residual = hidden_states.add_(residual)
        hidden_states = self.post_attention_layernorm(residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states.add_(residual)


_FUSED: dict[FusedPart, type] = {
    "norm": FusedNorm,
    "mlp": FusedMlp,
    "attention": FusedAttention,
    "layer": FusedLayer,
}


def _attention_function(name: str, kind: type) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function that `transformers` would call for a module of `kind`."""
    eager = sys.modules[kind.__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return found
