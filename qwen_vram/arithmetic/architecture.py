"""The shape of a dense Qwen model: the only reader of config.json keys, and the list of every weight.

It knows names, shapes, roles, and the dtype that config.json names. It does not know bytes or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from qwen_vram.arithmetic.quantization import method_of, quantization_of, settings_of, skipped_modules, stored_format
from qwen_vram.arithmetic.quantizers import method_name, not_loaded
from qwen_vram.arithmetic.stored import Stored, StoredTensor
from qwen_vram.errors import ConfigError

Role = Literal["embedding", "attention", "mlp", "norm", "head", "adapter"]

SUPPORTED = ("qwen2", "qwen3")

# Largest dimension believed. Llama-3 405B's intermediate_size is 53,248 and the largest published vocabulary about
# 262,144; a config.json past this bound is damaged or hostile.
_LARGEST = 10_000_000

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Weight(NamedTuple):
    """One parameter: its name in the checkpoint, its shape, and what it is for."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def is_linear(self) -> bool:
        """Whether a storage format applies: the matrices of attention, MLP and head, nothing else."""
        return len(self.shape) == 2 and self.role not in ("embedding", "adapter")

    @property
    def module(self) -> str:
        """The module's own name, such as `q_proj`."""
        return self.name.split(".")[-2]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense decoder of the Qwen2, Qwen2.5 or Qwen3 kind, in config.json's own spelling.

    Attributes:
        model_type: `"qwen2"` (biases on q, k and v) or `"qwen3"` (norms on queries and keys, no such biases).
        head_dim: Size of one head; Qwen2 has no such key, so there it is `hidden_size // num_attention_heads`.
        vocab_size: Rows of the embedding, not the tokenizer's count.
        max_position_embeddings: Positions the model may be used with, YaRN's factor included where config.json sets it.
        tie_word_embeddings: The head is the embedding's own tensor, so it is neither stored nor counted twice.
        attention_bias: q, k and v carry biases. (o does too on a Qwen3 whose config.json sets `attention_bias`.)
        dtype: The plain dtype that config.json names; `"bf16"`, as every published one is, where it names none.
        stored_format: The storage format of a checkpoint that is quantized already; `None` for plain dtypes.
        stored_head: Whether its head is quantized too.
        stored: Its tensors' bytes, where its headers were read for them.
        adapter_weights: The tensors of a LoRA adapter that runs beside the base.
        first_layer: How many decoder layers come before these, where this is one device's part of a model (`slices`).
        layers_after: How many come behind them.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: str = "bf16"
    stored_format: str | None = None
    stored_head: bool = False
    stored: Stored | None = field(default=None, repr=False)
    adapter_weights: tuple[Weight, ...] = ()
    first_layer: int = 0
    layers_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that `from_dict` takes, also by way of JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """What `to_dict` gave. Any other mapping is not checked: `from_config` reads those.

        Raises:
            KeyError, TypeError: a part is missing or of another form.
        """
        stored = data["stored"]
        if stored is not None:
            embedding, layers, norm, head = stored
            every = [tuple(StoredTensor(*tensor) for tensor in part) for part in (embedding, norm, head, *layers)]
            stored = Stored(every[0], tuple(every[3:]), every[1], every[2])
        weights = tuple(Weight(name, tuple(shape), role) for name, shape, role in data["adapter_weights"])
        return cls(**{**data, "stored": stored, "adapter_weights": weights})

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, source: str = "config") -> Architecture:
        """The architecture that a config.json describes.

        Raises:
            ConfigError: another architecture, a missing key, an impossible size, or a feature that would be
                counted wrong (sliding windows, a quantization whose bytes only the checkpoint's headers say).
        """
        reader = _Reader(config, source)
        model_type = reader.model_type()
        heads = reader.size("num_attention_heads")
        hidden_size = reader.size("hidden_size")
        explicit = config.get("head_dim") is not None
        if not explicit and hidden_size % heads:
            raise reader.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
        head_dim = reader.size("head_dim") if explicit else hidden_size // heads
        key_value_heads = reader.size("num_key_value_heads", default=heads)
        if heads % key_value_heads:
            raise reader.error(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value_heads}"
            )
        if head_dim % 2:
            raise reader.error(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
        if config.get("hidden_act", "silu") != "silu":
            raise reader.error(
                f"hidden_act {config['hidden_act']!r} is not counted; every Qwen of these kinds has 'silu'"
            )
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_hidden_layers=reader.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=reader.size("vocab_size"),
            max_position_embeddings=reader.positions(),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            attention_bias=model_type == "qwen2" or reader.flag("attention_bias"),
            dtype=reader.dtype(),
            **reader.stored(),
        )

    @property
    def starts(self) -> bool:
        """Whether the token table, the rotary tables and what `generate` keeps are here."""
        return self.first_layer == 0

    @property
    def ends(self) -> bool:
        """Whether the last norm is here."""
        return self.layers_after == 0

    @property
    def has_head(self) -> bool:
        """Whether the head is here: behind the last layer, or where it is the token table, with that."""
        return self.starts if self.tie_word_embeddings else self.ends

    @property
    def attention_width(self) -> int:
        """Elements of one token's queries: `num_attention_heads * head_dim`."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Elements of one token's keys (and of its values) in one layer: `num_key_value_heads * head_dim`."""
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def block(self) -> tuple[Weight, ...]:
        """The weights of one decoder layer, named from the layer down, in `transformers`' order."""
        hidden, inner = self.hidden_size, self.intermediate_size
        wide, narrow = self.attention_width, self.key_value_width
        qwen3 = self.model_type == "qwen3"
        weights: list[Weight] = []
        for name, rows, columns in (("q", wide, hidden), ("k", narrow, hidden), ("v", narrow, hidden)):
            weights.append(Weight(f"self_attn.{name}_proj.weight", (rows, columns), "attention"))
            if self.attention_bias:
                weights.append(Weight(f"self_attn.{name}_proj.bias", (rows,), "attention"))
        weights.append(Weight("self_attn.o_proj.weight", (hidden, wide), "attention"))
        if qwen3:
            if self.attention_bias:
                weights.append(Weight("self_attn.o_proj.bias", (hidden,), "attention"))
            weights.append(Weight("self_attn.q_norm.weight", (self.head_dim,), "norm"))
            weights.append(Weight("self_attn.k_norm.weight", (self.head_dim,), "norm"))
        return (
            *weights,
            Weight("mlp.gate_proj.weight", (inner, hidden), "mlp"),
            Weight("mlp.up_proj.weight", (inner, hidden), "mlp"),
            Weight("mlp.down_proj.weight", (hidden, inner), "mlp"),
            Weight("input_layernorm.weight", (hidden,), "norm"),
            Weight("post_attention_layernorm.weight", (hidden,), "norm"),
        )

    @cached_property
    def outer(self) -> tuple[Weight, ...]:
        """The weights outside the decoder layers: embedding, last norm, and the head if it is a tensor of its own."""
        table = (self.vocab_size, self.hidden_size)
        embedding = (Weight("model.embed_tokens.weight", table, "embedding"),) if self.starts else ()
        norm = (Weight("model.norm.weight", (self.hidden_size,), "norm"),) if self.ends else ()
        head = (self.head,) if self.has_head and not self.tie_word_embeddings else ()
        return (*embedding, *norm, *head)

    @property
    def head(self) -> Weight:
        """The head's matrix, whether or not it is the embedding's tensor."""
        return Weight("lm_head.weight", (self.vocab_size, self.hidden_size), "head")

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The modules that an adapter works on, by their own names."""
        return frozenset(weight.name.partition(".lora_")[0].split(".")[-1] for weight in self.adapter_weights)

    def weights(self) -> Iterator[Weight]:
        """Every weight of the model by the name it has in the checkpoint; a tied head is not listed twice."""
        yield from (weight for weight in self.outer if weight.role == "embedding")
        for layer in range(self.first_layer, self.first_layer + self.num_hidden_layers):
            for weight in self.block:
                yield weight._replace(name=f"model.layers.{layer}.{weight.name}")
        yield from (weight for weight in self.outer if weight.role != "embedding")

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, a tied tensor counted once. Exact."""
        block = sum(weight.numel for weight in self.block)
        return sum(weight.numel for weight in self.outer) + self.num_hidden_layers * block


class _Reader:
    """Reads checked values out of a config.json's object."""

    def __init__(self, config: Mapping[str, object], source: str) -> None:
        self.config = config
        self.source = source

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.source}: {what}; check the file against the published one", source=self.source)

    def model_type(self) -> str:
        """The supported `model_type`; everything that would be counted wrong is refused here by name."""
        got = self.config.get("model_type")
        if got not in SUPPORTED:
            raise ConfigError(
                f"{self.source}: model_type {got!r} is not supported; dense {' and '.join(SUPPORTED)} are "
                "(Qwen2, Qwen2.5, Qwen3)",
                source=self.source,
            )
        layer_types = self.config.get("layer_types")
        sliding = isinstance(layer_types, (list, tuple)) and "sliding_attention" in layer_types
        if self.flag("use_sliding_window") or sliding:
            raise ConfigError(
                f"{self.source}: sliding-window attention is switched on, which this library does not count; "
                "set use_sliding_window to false",
                source=self.source,
            )
        return str(got)

    def dtype(self) -> str:
        """The plain dtype, by the name that its storage format has here."""
        named = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return _DTYPES.get(named.removeprefix("torch."), "bf16")

    def stored(self) -> dict[str, Any]:
        """`stored_format` and `stored_head` of a checkpoint that bitsandbytes quantized; empty for plain dtypes."""
        quantization = quantization_of(self.config)
        if quantization is None:
            return {}
        name, in_headers = stored_format(quantization)
        method = method_of(quantization)
        if name is None:
            reason = not_loaded(quantization, method or method_name(quantization), None)
            raise ConfigError(f"{self.source}: {reason}", source=self.source)
        if in_headers:
            raise ConfigError(
                f"{self.source}: the checkpoint is already quantized by {method!r}, which is not counted from a config "
                "alone: its safetensors headers say the bytes; pass the checkpoint's folder or its hub id",
                source=self.source,
            )
        return {"stored_format": name, "stored_head": "lm_head" not in skipped_modules(settings_of(quantization))}

    def size(self, key: str, *, default: int | None = None) -> int:
        """A positive integer."""
        value = self.config.get(key, default)
        if value is None:
            raise self.error(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
            raise self.error(f"{key} must be a positive integer of at most {_LARGEST}, got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """A boolean that is false where it is missing, as in `transformers`."""
        value = self.config.get(key, False)
        if not isinstance(value, bool) and value is not None:
            raise self.error(f"{key} must be true or false, got {value!r}")
        return bool(value)

    def positions(self) -> int:
        """`max_position_embeddings`, stretched by YaRN where config.json asks for that."""
        positions = self.size("max_position_embeddings")
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters")
        if isinstance(scaling, Mapping):
            factor = scaling.get("factor")
            original = scaling.get("original_max_position_embeddings", positions)
            if isinstance(factor, (int, float)) and isinstance(original, int):
                return max(positions, int(factor * original))
        return positions
