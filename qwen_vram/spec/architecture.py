"""The shape of a decoder, and the list of every weight.

It has names, shapes, roles, and the dtype that config.json names. It has no bytes and no devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_vram.spec.families import open_config
from qwen_vram.spec.layers import LayerSpec, Weight
from qwen_vram.spec.rope import Rope, read_rope

if TYPE_CHECKING:
    from qwen_vram.spec.prequantized import Stored


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of one of the families (`spec.families`), in config.json's own spelling.

    Attributes:
        model_type: The family, such as `"qwen2"`.
        layers: Its decoder layers, in order.
        rotary_dim: Elements of one token's cosines, and of its sines.
        vocab_size: Rows of the embedding, not the tokenizer's count.
        max_position_embeddings: Positions that the model may be used with, including YaRN's factor if config.json sets
            one.
        tie_word_embeddings: The head is the embedding's own tensor, so it is neither stored nor counted twice.
        dtype: The plain dtype that config.json names; `"bf16"`, the dtype of every published one, if it names none.
        stored_format: The storage format of a checkpoint that is quantized already; `None` for plain dtypes.
        stored_head: The head of such a checkpoint is quantized too.
        stored: Bytes of such a checkpoint's tensors, if its headers were read for them.
        adapter_weights: The tensors of a LoRA adapter that runs beside the base.
        adapter_replaces: Names of the base's tensors whose values the adapter replaces.
        adapter_activated: The adapter acts on the tokens behind its invocation tokens only (an activated LoRA).
        adapter_mutates_base: The setting by which PEFT changes the base's weights when it loads the adapter (PiSSA,
            OLoRA, KaSA); empty if it does not.
        adapter_in_blocks: Some of its factors hold the blocks of a diagonal (BD-LoRA).
        adapter_layers: The number of the base's layer for each of these, if the adapter's model is made of other layers
            than the base.
        first_layer: The number of decoder layers before these, if this is one device's part of a model
            (`arithmetic.pipeline`).
        layers_after: The number of decoder layers after these.
        rope: The rotary positions of config.json; `None` without one.
        layer_dtypes: The dtypes, as safetensors spells them, of the decoder layers' large tensors, if their headers
            were read.
    """

    model_type: str
    hidden_size: int
    layers: tuple[LayerSpec, ...] = field(repr=False)
    rotary_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
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
        """The hash of the fields, computed once, because it is slow with the tensors of a checkpoint."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        """The fields without the hash, which differs in another process."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `from_dict`, also through JSON. Each kind of layer is listed once."""
        kinds = [layer for layer, _ in self.kinds]
        numbers = {layer: number for number, layer in enumerate(kinds)}
        alike = asdict(replace(self, layers=()))
        order = [numbers[layer] for layer in self.layers]
        return {**alike, "layers": {"kinds": [layer.to_dict() for layer in kinds], "order": order}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Make the architecture of `to_dict`'s data. Other mappings are not checked: use `from_config` for them.

        Raises:
            KeyError, TypeError: a part is missing or has another form.
        """
        stored = data["stored"]
        if stored is not None:
            from qwen_vram.spec.prequantized import Stored, StoredTensor  # only for a quantized checkpoint

            embedding, layers, norm, head = stored
            every = [tuple(StoredTensor(*tensor) for tensor in part) for part in (embedding, norm, head, *layers)]
            stored = Stored(every[0], tuple(every[3:]), every[1], every[2])
        weights = tuple(Weight(name, tuple(shape), role) for name, shape, role in data["adapter_weights"])
        replaced = tuple(data.get("adapter_replaces", ()))
        given = data.get("rope")
        rope = None if given is None else Rope(*given)
        if rope is not None:
            rope = rope._replace(rest=tuple((key, value) for key, value in rope.rest), notes=tuple(rope.notes))
        kinds = {number: LayerSpec.from_dict(kind) for number, kind in enumerate(data["layers"]["kinds"])}
        layers = tuple(kinds[number] for number in data["layers"]["order"])
        read = {
            "layers": layers,
            "stored": stored,
            "adapter_weights": weights,
            "adapter_replaces": replaced,
            "rope": rope,
        }
        read |= {name: tuple(data.get(name, ())) for name in ("layer_dtypes", "adapter_layers")}
        return cls(**{**data, **read})

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, source: str = "config") -> Architecture:
        """Make the architecture that a config.json describes.

        Raises:
            ConfigError: another architecture, a missing key, an impossible size, or a feature that would be counted
                wrong. Such features are sliding windows, and a quantization whose bytes are only in the headers.
        """
        family, reader = open_config(config, source)
        model_type = str(config["model_type"])
        layers = family.layers(reader)
        rope = read_rope(config, model_type, reader.size("max_position_embeddings"), source, family.rope)
        return cls(
            model_type=model_type,
            hidden_size=reader.size("hidden_size"),
            layers=layers,
            rotary_dim=layers[0].attention.head_dim,
            vocab_size=reader.size("vocab_size"),
            max_position_embeddings=rope.reach,
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            dtype=reader.dtype(),
            rope=rope,
            **reader.stored(),
        )

    @property
    def num_hidden_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @cached_property
    def kinds(self) -> tuple[tuple[LayerSpec, int], ...]:
        """The kinds of layers in the order of their first layers, with the number of layers of each kind."""
        return tuple(Counter(self.layers).items())

    @property
    def starts(self) -> bool:
        """Tell if the token embeddings, the rotary tables and `generate`'s own tensors are here."""
        return self.first_layer == 0

    @property
    def ends(self) -> bool:
        """Tell if the last norm is here."""
        return self.layers_after == 0

    @property
    def has_head(self) -> bool:
        """Tell if the head is here: after the last layer, or with the token embeddings if it is tied to them."""
        return self.starts if self.tie_word_embeddings else self.ends

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
        """The head's matrix; it may be the embedding's tensor."""
        return Weight("lm_head.weight", (self.vocab_size, self.hidden_size), "head")

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The modules that an adapter acts on, by their own names."""
        return frozenset(weight.name.partition(".lora_")[0].split(".")[-1] for weight in self.adapter_weights)

    def weights(self) -> Iterator[Weight]:
        """Every weight of the model by the name it has in the checkpoint; a tied head is not listed twice."""
        yield from (weight for weight in self.outer if weight.role == "embedding")
        for number, layer in enumerate(self.layers, self.first_layer):
            for name, shape, role in layer.weights:
                yield Weight(f"model.layers.{number}.{name}", shape, role)
        yield from (weight for weight in self.outer if weight.role != "embedding")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its name, as in `weights`."""
        shapes = {weight.name: weight.shape for weight in self.outer}
        for number, layer in enumerate(self.layers, self.first_layer):
            prefix = f"model.layers.{number}."
            for name, shape, _ in layer.weights:
                shapes[prefix + name] = shape
        return shapes

    @cached_property
    def num_parameters(self) -> int:
        """The number of parameters. A tied tensor is counted once. Exact."""
        outer = sum(weight.numel for weight in self.outer)
        return outer + sum(count * layer.numel for layer, count in self.kinds)
