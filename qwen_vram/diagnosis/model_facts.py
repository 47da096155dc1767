"""Facts of a model that checks read: its matrices, settings, and places of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_vram.dtypes import FP16, FP32, Dtype
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile

Role = Literal["layer", "head", "embedding", "experts", "router", "adapter", "other"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight of a module.

    Attributes:
        name: Its name in the model.
        shape: Its shape before quantization: rows and columns, and experts before them if several are fused.
        nbytes: Bytes of its storages, with quantization state.
        dtype: The dtype of a dense matrix; the one from which codes were made otherwise.
        role: Its place in the model.
        codes: bitsandbytes' name of its 4-bit codes; empty for other matrices.
        is_dense: It is not quantized.
        is_double: Its scales are quantized too.
        compute_dtype: The dtype in which its 4-bit products run; empty for other matrices.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    dtype: str
    role: Role = "layer"
    codes: str = ""
    is_dense: bool = True
    is_double: bool = False
    compute_dtype: str = ""

    @property
    def numel(self) -> int:
        """Number of its weights."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def nf4_bytes(self) -> int:
        """Bytes of the same weights in NF4 with double quantization."""
        return FORMATS["nf4"].nbytes((self.numel,))

    @property
    def is_fp32(self) -> bool:
        """Tell if it is dense in 32 bits."""
        return self.is_dense and self.dtype == FP32.name


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Weights that accelerate's hooks move to the device for each forward pass.

    Attributes:
        host: Bytes in host memory.
        disk: Bytes in files.
        pinned: Bytes of `host` in pinned memory.
        hook_ms: Milliseconds that the hooks take for one pass, measured on some modules; `None` if not measured.
        measured: Bytes of the modules whose hooks were measured.
    """

    host: int = 0
    disk: int = 0
    pinned: int = 0
    hook_ms: float | None = None
    measured: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Settings of `generate` that change memory or time, from the model's generation_config.

    Attributes:
        use_cache: Keys and values are kept.
        cache: `cache_implementation`; empty for the dynamic default.
        chunk: `prefill_chunk_size`.
        longest_static: The longest static cache so far; later ones are never shorter.
    """

    use_cache: bool = True
    cache: str = ""
    chunk: int | None = None
    longest_static: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model as it is loaded, or as a plain `from_pretrained` would load it.

    Attributes:
        label: Its name in texts, without a path.
        is_live: It is loaded in this process.
        profile: The profile by which this library loaded it; `None` for other models.
        config: The text model's configuration.
        kind: Its `model_type`.
        device: `"cuda"`, `"cpu"` or `"meta"`: the device that computes.
        gpus: The number of GPUs that it is on; 1 on other devices.
        dtype: The dtype of its activations.
        matrices: Its weights with two or three dimensions.
        weight_bytes: Bytes of all tensors, each storage once.
        resident_bytes: Bytes of those on the device that computes.
        attention: The attention implementation, as `transformers` names it.
        sdpa_backend: The kernel that torch chooses for its shapes: `"FLASH_ATTENTION"`, `"MATH"` and others; empty if
            it was not asked.
        sdpa_reason: The reason why it is not flash; empty if it is.
        generation: Settings of `generate`.
        offload: Weights that hooks move.
        gradients: Bytes of gradients.
        head_copy: Bytes of a head that should be the embedding's own tensor.
        has_conv3d: A module computes 3-D convolutions (vision models).
        product_rate: Operations a second of a product on its device, measured; `None` if not measured.
    """

    label: str
    is_live: bool
    config: Mapping[str, Any] = field(repr=False)
    kind: str
    device: str
    dtype: str
    matrices: tuple[Matrix, ...] = field(repr=False)
    weight_bytes: int
    resident_bytes: int
    gpus: int = 1
    attention: str = "sdpa"
    profile: Profile | None = None
    sdpa_backend: str = ""
    sdpa_reason: str = ""
    generation: Generation = Generation()
    offload: Offload = Offload()
    gradients: int = 0
    head_copy: int = 0
    has_conv3d: bool = False
    product_rate: float | None = None

    @property
    def is_planned(self) -> bool:
        """Tell if this library loaded it by a plan, which has chosen its settings."""
        return self.profile is not None

    @property
    def on_gpu(self) -> bool:
        """Tell if it computes on an NVIDIA GPU."""
        return self.device == "cuda"

    @property
    def is_quantized(self) -> bool:
        """Tell if some of its matrices are quantized."""
        return any(not matrix.is_dense for matrix in self.matrices)

    @property
    def weights_format(self) -> str:
        """The storage format of its layers by this library's names; its dtype if they are mixed or of another kind."""
        coded = [matrix for matrix in self.matrices if matrix.codes]
        name = f"{coded[0].codes}{'' if coded[0].is_double else '-plain'}" if coded else self.dtype
        return name if name in FORMATS else "bf16"

    def number(self, key: str, default: int = 0) -> int:
        """Return a whole number of the configuration."""
        value = self.config.get(key)
        return default if value is None or isinstance(value, bool) else int(value)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.number("num_hidden_layers")

    @property
    def linear_layers(self) -> int:
        """Decoder layers with linear attention, which have a state in place of a growing cache."""
        return sum(kind == "linear_attention" for kind in self.config.get("layer_types") or ())

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.number("num_attention_heads", 1)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        return self.number("num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.number("head_dim", self.number("hidden_size") // self.heads)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of its activations."""
        return dtype_bytes(self.dtype)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers with softmax attention."""
        layers = self.layers - self.linear_layers
        return 2 * layers * self.kv_heads * self.head_dim * self.element_bytes


def dtype_bytes(name: str) -> int:
    """Bytes of an element of a dtype in which models run; 2 for other names."""
    return {FP32.name: FP32.nbytes, FP16.name: FP16.nbytes}.get(name, 2)


def name_of(row: Dtype) -> str:
    """Return this library's name of a dtype, or torch's."""
    return row.name or row.torch
