"""The formats that a merged weight can be quantized to, by name, and int8."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from qwen_vram.errors import BackendUnavailableError, UnknownNameError
from qwen_vram.lora.codecs.base import Codec, Part
from qwen_vram.lora.codecs.bnb_4bit import FourBit
from qwen_vram.runtime.backends.bnb import quantization_config
from qwen_vram.spec.formats import FORMATS

# Formats on torch's operators, which only this library stores; the others are of bitsandbytes.
_OWN = tuple(name for name, row in FORMATS.items() if row.is_weight_only)
QUANTIZATIONS = ("nf4", "nf4-plain", "fp4", "int8", *_OWN)
# GPTQ chooses codes by the activations of the whole model, so it needs a merged checkpoint; see `lora.gptq`.
GPTQ = tuple(name for name, row in FORMATS.items() if row.needs_calibration)
_INSTALL = 'pip install "bitsandbytes>=0.50"'


def codec_for(quantize: str | None) -> Codec | None:
    """Return the codec called `quantize`; `None` keeps the base's own dtypes.

    Raises:
        BackendUnavailableError: bitsandbytes is missing, or the format needs more than weights.
        UnknownNameError: there is no such format.
    """
    if quantize is None:
        return None
    if quantize not in QUANTIZATIONS:
        raise UnknownNameError("quantization", quantize, (*QUANTIZATIONS, *GPTQ, "None"))
    storage = FORMATS[quantize]
    if storage.is_weight_only:
        from qwen_vram.lora.codecs.weight_only import ByGroup, ByRow  # needs transformers, unlike others

        return ByGroup(quantize) if storage.is_tinygemm else ByRow(quantize)
    if find_spec("bitsandbytes") is None:
        raise BackendUnavailableError(
            f"quantize={quantize!r} needs bitsandbytes, which is not installed; run: {_INSTALL}",
            backend="bnb",
            install=_INSTALL,
        )
    if storage.has_outliers:
        return Int8()
    return FourBit(storage.quant_type, nested=storage.is_double)


class Int8:
    """LLM.int8: codes of 8 bits, and the largest value of each row."""

    bits = 8
    group_size = 0
    scales_wait = False

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the parts: codes, row maxima, and the number of the row-wise layout."""
        return Part(".weight", "I8", shape), Part(".SCB", "F32", shape[:1]), Part(".weight_format", "U8", ())

    def row_step(self, columns: int) -> int:
        """Return 1, because rows are independent."""
        return 1

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and row maxima, rounded to fp16 first as by bitsandbytes."""
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(rows.to(torch.float16))
        return codes, scales

    def finish(
        self, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return row maxima and the number of the layout."""
        return {".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}, scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes times 1/127 of their row's maximum, in float32."""
        return codes.float().mul_((scales / 127.0).view(-1, 1))

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config`: the head is not quantized."""
        config: dict[str, Any] = quantization_config("int8", head=False, dtype=dtype).to_dict()
        return config
