"""Quantization of each matrix while `transformers` loads the checkpoint.

Source of the order of calls: transformers 5.17 and 5.23, quantizers/base.py and core_model_loading.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qwen_vram.runtime.linear.int4 import Int4Linear
from qwen_vram.runtime.linear.int8_fp8 import Fp8Linear, Int8Linear
from qwen_vram.runtime.linear.weight_only import WeightOnlyLinear
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.quantization import OWN_METHOD

LINEARS: dict[str, type[WeightOnlyLinear]] = {cls.format: cls for cls in (Int4Linear, Int8Linear, Fp8Linear)}


@register_quantization_config(OWN_METHOD)
class WeightOnlyConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a model whose `weights` have a storage format."""

    def __init__(self, weights: str, modules_to_not_convert: list[str], **_: Any) -> None:
        self.quant_method = OWN_METHOD
        self.weights = weights
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(OWN_METHOD)
class WeightOnlyQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizer that replaces linear layers on the meta device, and quantizes their matrices on their devices."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config = self.quantization_config
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name not in config.modules_to_not_convert:
                LINEARS[config.weights].adopt(module, stored=self.pre_quantized)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for module in model.modules():
            if isinstance(module, WeightOnlyLinear):
                if self.pre_quantized:
                    module.restore()
                module.loaded = True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Tell if the parameter is a matrix whose layer was replaced."""
        module = param_name.removesuffix(".weight")
        quantized = module != param_name and isinstance(model.get_submodule(module), WeightOnlyLinear)
        return quantized and not self.pre_quantized

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Return the stored bytes of one element, for the memory that is allocated before loading."""
        if self.param_needs_quantization(model, param_name):
            return FORMATS[self.quantization_config.weights].bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a matrix."""
        return _Quantize()

    def is_serializable(self) -> bool:
        """Return true: `state_dict()` has codes in the order of checkpoints."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True, because adapters beside the weights can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True, because products do not wait for the GPU."""
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, Tensor]:
        """Return the tensors that replace one matrix, by name."""
        assert model is not None
        ((name, value),) = input_dict.items()
        module = name.rpartition(".")[0]
        layer = model.get_submodule(module)
        assert isinstance(layer, WeightOnlyLinear)
        with torch.no_grad():
            made = layer.quantize(value[0] if isinstance(value, list) else value)
        return {f"{module}.{key}": tensor for key, tensor in made.items()}
