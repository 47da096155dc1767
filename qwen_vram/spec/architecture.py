"""The architecture of a dense Qwen model, with the list of all weights.

It knows names, shapes, roles, and the dtype that config.json names. It does not know bytes or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

from qwen_vram.spec.config_reader import ConfigReader
from qwen_vram.spec.prequantized import Stored, StoredTensor
from qwen_vram.spec.rope import Rope, read_rope

Role = Literal["embedding", "attention", "mlp", "norm", "head", "adapter"]


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
        """Tell if a storage format applies: the matrices of attention, MLP and head, nothing else."""
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
        adapter_replaces: Names of the base's tensors whose values the adapter replaces.
        adapter_activated: The adapter acts on the tokens behind its invocation tokens only (an activated LoRA).
        adapter_mutates_base: The setting by which PEFT changes the base's weights when it loads the adapter (PiSSA,
            OLoRA, KaSA); empty if it does not.
        adapter_in_blocks: Some of its factors hold the blocks of a diagonal (BD-LoRA).
        adapter_layers: The number of the base's layer for each of these, if the adapter's model is made of other layers
            than the base.
        first_layer: How many decoder layers come before these, if this is one device's part of a model
            (`arithmetic.pipeline`).
        layers_after: How many come behind them.
        rope: The rotary positions of config.json; `None` without one.
        layer_dtypes: The dtypes, as safetensors spells them, of the decoder layers' large tensors, if their headers
            were read.
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
    adapter_replaces: tuple[str, ...] = ()
    adapter_activated: bool = False
    adapter_mutates_base: str = ""
    adapter_in_blocks: bool = False
    adapter_layers: tuple[int, ...] = ()
    first_layer: int = 0
    layers_after: int = 0
    rope: Rope | None = field(default=None, repr=False)
    layer_dtypes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        """The fields' hash, made once: with the tensors of a checkpoint it takes longer than what is cached by it."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        """The fields without their hash, which another process makes otherwise."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

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
        replaced = tuple(data.get("adapter_replaces", ()))
        given = data.get("rope")
        rope = None if given is None else Rope(*given)
        if rope is not None:
            rope = rope._replace(rest=tuple((key, value) for key, value in rope.rest), notes=tuple(rope.notes))
        read = {"stored": stored, "adapter_weights": weights, "adapter_replaces": replaced, "rope": rope}
        read |= {name: tuple(data.get(name, ())) for name in ("layer_dtypes", "adapter_layers")}
        return cls(**{**data, **read})

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, source: str = "config") -> Architecture:
        """The architecture that a config.json describes.

        Raises:
            ConfigError: another architecture, a missing key, an impossible size, or a feature that would be
                counted wrong (sliding windows, a quantization whose bytes only the checkpoint's headers say).
        """
        reader = ConfigReader(config, source)
        model_type = reader.model_type
        heads = reader.size("num_attention_heads")
        hidden_size = reader.size("hidden_size")
        head_dim = reader.head_dim(hidden_size, heads)
        key_value_heads = reader.key_value_heads(heads)
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
        rope = read_rope(config, model_type, reader.size("max_position_embeddings"), source)
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_hidden_layers=reader.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=reader.size("vocab_size"),
            max_position_embeddings=rope.reach,
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            attention_bias=model_type == "qwen2" or reader.flag("attention_bias"),
            dtype=reader.dtype(),
            rope=rope,
            **reader.stored(),
        )

    @property
    def starts(self) -> bool:
        """Tell if the token table, the rotary tables and what `generate` keeps are here."""
        return self.first_layer == 0

    @property
    def ends(self) -> bool:
        """Tell if the last norm is here."""
        return self.layers_after == 0

    @property
    def has_head(self) -> bool:
        """Tell if the head is here: behind the last layer, or where it is the token table, with that."""
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
            for name, shape, role in self.block:
                yield Weight(f"model.layers.{layer}.{name}", shape, role)
        yield from (weight for weight in self.outer if weight.role != "embedding")

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, a tied tensor counted once. Exact."""
        block = sum(weight.numel for weight in self.block)
        return sum(weight.numel for weight in self.outer) + self.num_hidden_layers * block
