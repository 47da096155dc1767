"""nf4, fp4 and int8 by bitsandbytes, quantized tensor by tensor while they load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.dtypes import FP32
from qwen_vram.errors import BackendUnavailableError
from qwen_vram.runtime.backends.base import Request, from_pretrained, stored_config
from qwen_vram.runtime.backends.bnb_cpu import check_scales, keep_scales
from qwen_vram.runtime.backends.bnb_state import copied, itself, quantization_tensors, with_tensors
from qwen_vram.runtime.backends.dense import DenseBackend, filled, parameters, twin_binding
from qwen_vram.runtime.linear.cpu_4bit import import_quietly, kernel_library, multiply, pack
from qwen_vram.runtime.torch_dtypes import ROWS
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.quantization import skips

_INSTALL = 'pip install "bitsandbytes>=0.50"'

# LLM.int8 multiplies with int8 tensor cores from Turing on, the 4-bit kernels run from Pascal on.
# Source: bitsandbytes 0.50.2, its documentation's hardware table.
_OLDEST_INT8, _OLDEST_4_BIT = (7, 5), (6, 0)

# Columns of activations with a value of at least this size are multiplied in 16 bits.
# Source: transformers 5.23, BitsAndBytesConfig, llm_int8_threshold.
_THRESHOLD = 6.0


class _Once(logging.Filter):
    """Filter that passes each message of a logger once: bitsandbytes repeats one for every int8 product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        known = record.getMessage() in self.seen
        self.seen.add(record.getMessage())
        return not known


_ONCE = _Once()


def quantization_config(weights: str, *, head: bool, dtype: torch.dtype) -> Any:
    """Return `transformers`' BitsAndBytesConfig for a storage format, with all defaults set explicitly.

    Args:
        head: The head is quantized too.
        dtype: The model's dtype, in which products are computed.
    """
    from transformers import BitsAndBytesConfig

    # transformers skips the head unless it is given a list; an empty one skips nothing.
    options: dict[str, Any] = {"llm_int8_skip_modules": [] if head else ["lm_head"]}
    if FORMATS[weights].has_outliers:
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=FORMATS[weights].quant_type,
        bnb_4bit_use_double_quant=FORMATS[weights].is_double,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


class BnbBackend:
    """The backend of bitsandbytes, through `transformers`' own quantizer."""

    name = "bnb"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse a missing library, and a GPU that is too old."""
        if find_spec("bitsandbytes") is None:
            raise BackendUnavailableError(
                f"weights={profile.weights!r} needs bitsandbytes, which is not installed; run: {_INSTALL}",
                backend="bnb",
                install=_INSTALL,
            )
        oldest = _OLDEST_INT8 if FORMATS[profile.weights].has_outliers else _OLDEST_4_BIT
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < oldest:
            raise BackendUnavailableError(
                f"weights={profile.weights!r} needs a GPU of compute capability {oldest[0]}.{oldest[1]}, got "
                f"{torch.cuda.get_device_capability(device)}; use weights='fp16'",
                backend="bnb",
            )

    def load(self, request: Request) -> nn.Module:
        """Return the model with its matrices quantized; embeddings, norms and biases keep the model's dtype."""
        import_quietly()
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
        profile = request.profile
        # transformers quantizes nothing there: the embeddings never, and streamed layers in `build`.
        elsewhere = set(request.device_map.values())
        two_devices = "disk" in elsewhere or ("cpu" in elsewhere and request.device.type != "cpu")
        if request.stored:
            # The checkpoint's own settings override arguments, so they are changed in the config.
            config = stored_config(request)
            config.quantization_config["llm_int8_enable_fp32_cpu_offload"] = two_devices
            config.quantization_config["bnb_4bit_compute_dtype"] = ROWS[request.dtype].torch
            if request.profile.lm_head is None:
                _leave_head(config.quantization_config)
            model: Any = from_pretrained(request._replace(narrowed=_wide(request.files.tensors)), config=config)
        else:
            head = profile.head_format == profile.weights
            settings = quantization_config(profile.weights, head=head and not request.late_head, dtype=request.dtype)
            settings.llm_int8_enable_fp32_cpu_offload = two_devices
            model = from_pretrained(request, quantization_config=settings)
            model.config.quantization_config.llm_int8_skip_modules = [] if head else ["lm_head"]
        # Otherwise the saved model would count as unquantized on the CPU.
        model.config.quantization_config.llm_int8_enable_fp32_cpu_offload = False
        if request.device.type == "cpu":
            keep_scales(model)
        loaded: nn.Module = model
        return loaded

    def saved_config(self, model: nn.Module, profile: Profile) -> dict[str, Any]:
        """Return the `quantization_config`, which lists every matrix in 16 bits."""
        check_scales(model)
        head = profile.head_format == profile.weights
        loaded: Any = model.config
        config = quantization_config(
            profile.weights, head=head, dtype=loaded.quantization_config.bnb_4bit_compute_dtype
        )
        plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        config.llm_int8_skip_modules = sorted({*plain, *config.llm_int8_skip_modules})
        storage = next((dtype for module in model.modules() if (dtype := _storage(module))), torch.uint8)
        config.bnb_4bit_quant_storage = storage
        saved: dict[str, Any] = config.to_dict()
        return saved

    def build(self, module: nn.Module, weights: Mapping[str, torch.Tensor], request: Request) -> nn.Module:
        """Return bitsandbytes' linear layer in place of torch's, as `transformers` does; others stay.

        A layer that is stored quantized does not change: it is already of bitsandbytes.
        """
        if request.stored:
            from qwen_vram.runtime.backends.bnb_stored import restored

            return restored(module, weights, request.dtype)
        if not isinstance(module, nn.Linear):
            return filled(module, weights, request.dtype)
        import bitsandbytes as bnb

        from qwen_vram.runtime.backends.bnb_rows import eight_bit, four_bit

        matrix = weights["weight"].to(request.dtype)
        sizes = {"input_features": module.in_features, "output_features": module.out_features, "device": "meta"}
        storage, bias = FORMATS[request.profile.weights], module.bias is not None
        made: Any
        if storage.has_outliers:
            made = bnb.nn.Linear8bitLt(**sizes, bias=bias, has_fp16_weights=False, threshold=_THRESHOLD)
            codes, scales = eight_bit(matrix, request.device)
            made.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        else:
            quant_type, nested = storage.quant_type, storage.is_double
            kind = {"quant_type": quant_type, "compress_statistics": nested}
            made = bnb.nn.Linear4bit(**sizes, bias=bias, compute_dtype=request.dtype, **kind)
            codes, state = four_bit(matrix, request.device, quant_type=quant_type, nested=nested)
            made.weight = bnb.nn.Params4bit(
                codes, requires_grad=False, quant_state=state, module=made, bnb_quantized=True, **kind
            )
            made.quant_state = state
        made.source_cls = type(module)  # as transformers marks a replaced layer
        rest = {name: tensor for name, tensor in weights.items() if name != "weight"}
        return filled(made, rest, request.dtype).train(module.training)

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Return block maxima, code tables and offset of a 4-bit matrix, or row scales of an int8 matrix."""
        return list(quantization_tensors(module).values())

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return codes, biases, and the quantization state."""
        return {**parameters(module), **quantization_tensors(module)}

    def binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Return a call that sets parameters and quantization state; an int8 matrix is as after its first product."""
        own = parameters(module)
        bind_parameters = DenseBackend().binding(module, {name: tensors[name] for name in own})
        if len(tensors) == len(own):
            return bind_parameters
        weight: Any = module.weight
        if "SCB" in tensors:
            state: Any = module.state

            def bind() -> None:
                bind_parameters()
                weight.CB = weight.SCB = None
                state.CB, state.SCB = tensors["weight"], tensors["SCB"]

        else:
            made = with_tensors(weight.quant_state, tensors)
            # On the CPU the first product changes the state and the codes.
            fresh = copied if tensors["weight"].device.type == "cpu" else itself

            def bind() -> None:
                bind_parameters()
                weight.quant_state = module.quant_state = fresh(made)

        return bind

    def check_host(self, profile: Profile, architecture: Architecture) -> None:
        """Refuse a CPU without the fused 4-bit kernel."""
        if kernel_library() is None:
            raise BackendUnavailableError(
                f"host_layers={profile.host_layers} with weights={profile.weights!r}: bitsandbytes' fused 4-bit kernel "
                "needs a CPU with AVX512-BF16 and its CPU library, and one of them is not here; use host_layers=0, and "
                "the layers stream",
                backend=self.name,
            )

    def host_binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Return a call that uses a 4-bit matrix packed for the CPU's kernel, and other tensors unchanged."""
        if len(tensors) == len(parameters(module)):
            return twin_binding(module, tensors)
        weight: Any = module.weight
        matrix = pack(tensors["weight"], with_tensors(weight.quant_state, tensors))
        product = partial(multiply, matrix=matrix, bias=tensors.get("bias"))

        def bind() -> None:
            module.forward = product

        return bind


def _leave_head(settings: dict[str, Any]) -> None:
    """Add the head, stored in 16 bits, to the modules for which `transformers` makes no layer of bitsandbytes.

    The list lacks it if the head is tied to the embeddings and the list was made for another purpose.
    """
    skipped = settings.get("llm_int8_skip_modules")
    if skipped is not None and not skips(skipped, "lm_head"):
        settings["llm_int8_skip_modules"] = [*skipped, "lm_head"]


def _wide(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of float32 tensors that are not part of a quantized matrix."""
    return frozenset(
        name
        for name, tensor in tensors.items()
        if tensor.dtype == FP32.stored and name.endswith((".weight", ".bias")) and f"{name}.absmax" not in tensors
    )


def _storage(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a 4-bit matrix is stored in; `None` for other modules."""
    weight: Any = getattr(module, "weight", None)
    return weight.quant_storage if getattr(weight, "quant_state", None) is not None else None
