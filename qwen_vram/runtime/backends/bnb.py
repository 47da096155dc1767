"""nf4, nf4-plain, fp4 and int8 by bitsandbytes, quantized tensor by tensor while they load, and saved as they are."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qwen_vram.arithmetic.profile import Profile
from qwen_vram.errors import BackendUnavailableError, NotSupportedError
from qwen_vram.runtime.backends.base import Request, from_pretrained
from qwen_vram.runtime.backends.bnb_cpu import check_scales, keep_scales

_INSTALL = 'pip install "bitsandbytes>=0.50"'

# LLM.int8 multiplies with int8 tensor cores from Turing on, the 4-bit kernels run from Pascal on.
# Source: bitsandbytes 0.50.2, its documentation's hardware table.
_OLDEST = {"int8": (7, 5), "nf4": (6, 0), "nf4-plain": (6, 0), "fp4": (6, 0)}


class _Once(logging.Filter):
    """Lets each message of a logger through once: bitsandbytes repeats one for every int8 product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        known = record.getMessage() in self.seen
        self.seen.add(record.getMessage())
        return not known


_ONCE = _Once()


def _import_quietly() -> None:
    """Import bitsandbytes without the line that it logs on CPUs with AVX512-BF16, which asks for a kernel hub."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)


def quantization_config(weights: str, *, head: bool, dtype: torch.dtype) -> Any:
    """`transformers`' BitsAndBytesConfig for a storage format, with its surprising defaults all set.

    Args:
        head: Whether the head is quantized too.
        dtype: The model's own, in which products are computed.
    """
    from transformers import BitsAndBytesConfig

    # transformers skips the head unless it is given a list; an empty one skips nothing.
    options: dict[str, Any] = {"llm_int8_skip_modules": [] if head else ["lm_head"]}
    if weights == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4" if weights == "fp4" else "nf4",
        bnb_4bit_use_double_quant=weights != "nf4-plain",
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


class BnbBackend:
    """bitsandbytes through `transformers`' own quantizer."""

    name = "bnb"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse a missing library, a GPU that is too old, and a head in a third format."""
        if find_spec("bitsandbytes") is None:
            raise BackendUnavailableError(
                f"weights={profile.weights!r} needs bitsandbytes, which is not installed; run: {_INSTALL}",
                backend="bnb",
                install=_INSTALL,
            )
        oldest = _OLDEST[profile.weights]
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < oldest:
            raise BackendUnavailableError(
                f"weights={profile.weights!r} needs a GPU of compute capability {oldest[0]}.{oldest[1]}, got "
                f"{torch.cuda.get_device_capability(device)}; use weights='fp16'",
                backend="bnb",
            )
        if profile.head_format not in (profile.dtype, profile.weights):
            raise NotSupportedError(
                f"lm_head={profile.head_format!r} with weights={profile.weights!r}: bitsandbytes takes one format for "
                f"a model; use lm_head={profile.weights!r}, or leave it out",
                knob="lm_head",
                value=profile.head_format,
            )

    def load(self, request: Request) -> nn.Module:
        """The model with its matrices quantized; embeddings, norms and biases keep the model's dtype."""
        from transformers import AutoConfig

        _import_quietly()
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
        profile = request.profile
        # Only the embedding is on the host then, which is not quantized anyway.
        two_devices = "cpu" in request.device_map.values() and request.device.type != "cpu"
        if request.stored:
            # The checkpoint's own settings win over any that are passed, so they are changed where they stand.
            config = AutoConfig.from_pretrained(request.folder, local_files_only=True, trust_remote_code=False)
            config.quantization_config["llm_int8_enable_fp32_cpu_offload"] = two_devices
            config.quantization_config["bnb_4bit_compute_dtype"] = str(request.dtype).removeprefix("torch.")
            model = from_pretrained(request, config=config)
        else:
            settings = quantization_config(
                profile.weights, head=profile.head_format == profile.weights, dtype=request.dtype
            )
            settings.llm_int8_enable_fp32_cpu_offload = two_devices
            model = from_pretrained(request, quantization_config=settings)
        if request.device.type == "cpu":
            keep_scales(model)
        return model

    def saved_config(self, model: nn.Module, profile: Profile) -> dict[str, Any]:
        """What config.json says of the quantization."""
        check_scales(model)
        config: dict[str, Any] = quantization_config(
            profile.weights,
            head=profile.head_format == profile.weights,
            dtype=model.dtype,  # type: ignore[arg-type]
        ).to_dict()
        return config

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Block maxima, code tables and offset of a 4-bit matrix, row scales of an int8 one."""
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            return [state.absmax, state.code, *nested]
        scales = getattr(weight, "SCB", None)
        return [scales] if isinstance(scales, torch.Tensor) else []
