"""Description of a decoder layer: its weights, its attention, and its sizes.

A family (`spec.families`) makes one description for each kind of layer. All other modules read the description.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

Role = Literal["embedding", "attention", "mlp", "norm", "head", "adapter"]

ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")


class Weight(NamedTuple):
    """One parameter: its name in the checkpoint, its shape, and its role."""

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
        """Tell if a storage format applies, as it does to the matrices of attention, MLP and head only."""
        return len(self.shape) == 2 and self.role not in ("embedding", "adapter")

    @property
    def module(self) -> str:
        """The module's own name, such as `q_proj`."""
        return self.name.split(".")[-2]


class Attention(NamedTuple):
    """Softmax attention over cached keys and values.

    Attributes:
        heads: Heads of the queries.
        key_value_heads: Heads of keys and values; a divisor of `heads`.
        head_dim: Size of one head.
        head_norms: Queries and keys are normed, head by head.
    """

    heads: int
    key_value_heads: int
    head_dim: int
    head_norms: bool = False

    @property
    def width(self) -> int:
        """Elements of one token's queries."""
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Elements of one token's keys, and of its values, in the cache."""
        return self.key_value_heads * self.head_dim

    @property
    def is_grouped(self) -> bool:
        """Tell if several heads of queries share keys and values."""
        return self.heads > self.key_value_heads


class LayerSpec:
    """One decoder layer, which is not changed. Equal layers of a model share one description.

    Args:
        attention: Its attention, with the sizes of the keys and values that it caches.
        inner_size: Width of its MLP.
        weights: Its weights, with names relative to the layer, in the order of `transformers`.
    """

    def __init__(self, *, attention: Attention, inner_size: int, weights: tuple[Weight, ...]) -> None:
        self.attention, self.inner_size, self.weights = attention, inner_size, weights

    def to_dict(self) -> dict[str, Any]:
        """The arguments by name, for `from_dict`."""
        return {"attention": self.attention, "inner_size": self.inner_size, "weights": self.weights}

    def __eq__(self, other: object) -> bool:
        """Equal arguments make equal layers."""
        return isinstance(other, LayerSpec) and (self is other or self.to_dict() == other.to_dict())

    def __hash__(self) -> int:
        """The hash of the arguments, computed once, because caches use a layer as a key."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.attention, self.inner_size, self.weights))

    def __repr__(self) -> str:
        """As it is made."""
        return f"LayerSpec({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def __getstate__(self) -> dict[str, Any]:
        """The state without the hash, which differs in another process."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    @cached_property
    def linears(self) -> Mapping[str, Weight]:
        """Its matrices by the names of their modules."""
        return {weight.module: weight for weight in self.weights if weight.is_linear}

    @cached_property
    def biased(self) -> frozenset[str]:
        """The modules that have a bias, by their own names."""
        return frozenset(weight.module for weight in self.weights if weight.name.endswith(".bias"))

    @cached_property
    def children(self) -> tuple[str, ...]:
        """The direct child modules of the layer, in the order of their weights."""
        return tuple(dict.fromkeys(weight.name.partition(".")[0] for weight in self.weights))

    @cached_property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def linear_numel(self) -> int:
        """The number of parameters of its matrices."""
        return sum(weight.numel for weight in self.linears.values())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerSpec":
        """Make the layer that `to_dict` turned into `data`."""
        weights = tuple(Weight(name, tuple(shape), role) for name, shape, role in data["weights"])
        return cls(attention=Attention(*data["attention"]), inner_size=data["inner_size"], weights=weights)


def dense_layer(hidden_size: int, inner_size: int, attention: Attention, biased: Collection[str] = ()) -> LayerSpec:
    """Make a layer of softmax attention and a gated MLP, each after an RMSNorm.

    Args:
        biased: Names of the modules whose matrices have a bias, of `ATTENTION_MATRICES` and `MLP_MATRICES`.
    """
    wide, narrow = attention.width, attention.key_value_width
    rows = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": hidden_size}
    weights: list[Weight] = []

    def add(parent: str, name: str, shape: tuple[int, int], role: Role) -> None:
        weights.append(Weight(f"{parent}.{name}.weight", shape, role))
        if name in biased:
            weights.append(Weight(f"{parent}.{name}.bias", shape[:1], role))

    for name in ATTENTION_MATRICES:
        add("self_attn", name, (rows[name], wide if name == "o_proj" else hidden_size), "attention")
    if attention.head_norms:
        weights.append(Weight("self_attn.q_norm.weight", (attention.head_dim,), "norm"))
        weights.append(Weight("self_attn.k_norm.weight", (attention.head_dim,), "norm"))
    for name in MLP_MATRICES:
        shape = (hidden_size, inner_size) if name == "down_proj" else (inner_size, hidden_size)
        add("mlp", name, shape, "mlp")
    weights.append(Weight("input_layernorm.weight", (hidden_size,), "norm"))
    weights.append(Weight("post_attention_layernorm.weight", (hidden_size,), "norm"))
    return LayerSpec(attention=attention, inner_size=inner_size, weights=tuple(weights))
