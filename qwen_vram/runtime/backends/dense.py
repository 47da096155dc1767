"""bf16, fp16 and fp32: weights as they are."""

from __future__ import annotations

import torch
from torch import nn

from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.errors import NotSupportedError
from qwen_vram.runtime.backends.base import Request, from_pretrained


class DenseBackend:
    """Plain dtypes, through `from_pretrained`."""

    name = "dense"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse a head of another format than the rest: only quantizing backends can mix."""
        if profile.head_format != profile.dtype:
            kind = "quantized " if not FORMATS[profile.head_format].is_dense else ""
            raise NotSupportedError(
                f"lm_head={profile.head_format!r} with weights={profile.weights!r}: a {kind}head of its own needs "
                "quantized weights of the same format; leave lm_head out, or set weights too",
                knob="lm_head",
                value=profile.head_format,
            )

    def load(self, request: Request) -> nn.Module:
        """The model in its own dtype."""
        return from_pretrained(request)

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Nothing beside the parameters."""
        return []
