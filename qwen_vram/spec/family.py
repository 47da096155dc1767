"""Description of a family: the common properties of one `model_type`'s models."""

from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple

from qwen_vram.spec.config.keys import Keys
from qwen_vram.spec.config.reader import ConfigReader
from qwen_vram.spec.layers import Attention, LayerSpec, dense_layer
from qwen_vram.spec.rope import RopeRules

# Parts of a decoder layer for which `kernels="fused"` has a forward of its own.
FusedPart = Literal["norm", "mlp", "attention", "layer"]

_PARTS: dict[str, FusedPart] = {
    "RMSNorm": "norm", "MLP": "mlp", "Attention": "attention", "DecoderLayer": "layer",
}  # fmt: skip


def _nothing(_: Mapping[str, object]) -> str:
    return ""


class Family(NamedTuple):
    """The models of one `model_type`.

    Attributes:
        names: The names under which they are published.
        keys: The keys of config.json that `transformers` types, with its defaults.
        layers: Makes the descriptions of the decoder layers; raises `ConfigError` for impossible sizes.
        refusal: The text for a config.json with a feature that would be counted wrong; empty if it has no such feature.
        wrong: The text for a combination of values that `transformers` refuses; empty if it accepts them.
        rope: The lengths that its models were trained for, and the allowed extensions.
        fused: Full names of the classes of `transformers` that the fused kernels may replace, and their parts.
    """

    names: tuple[str, ...]
    keys: Keys
    layers: Callable[[ConfigReader], tuple[LayerSpec, ...]]
    refusal: Callable[[Mapping[str, object]], str] = _nothing
    wrong: Callable[[Mapping[str, object]], str] = _nothing
    rope: RopeRules = RopeRules()
    fused: Mapping[str, FusedPart] = {}


def dense_layers(
    reader: ConfigReader, *, publisher: str, biased: Collection[str] = (), head_norms: bool = False
) -> tuple[LayerSpec, ...]:
    """Make equal layers of softmax attention and a gated MLP, in the sizes that config.json names.

    Args:
        publisher: The publisher of these models, for the error about another activation.
        biased: As for `dense_layer`.

    Raises:
        ConfigError: an impossible size, or another activation than SiLU.
    """
    heads, hidden_size = reader.size("num_attention_heads"), reader.size("hidden_size")
    head_dim = reader.head_dim(hidden_size, heads)
    attention = Attention(heads, reader.key_value_heads(heads), head_dim, head_norms)
    activation = reader.config.get("hidden_act", "silu")
    if activation != "silu":
        raise reader.error(f"hidden_act {activation!r} is not counted; every {publisher} of these kinds has 'silu'")
    layer = dense_layer(hidden_size, reader.size("intermediate_size"), attention, biased)
    return (layer,) * reader.size("num_hidden_layers")


def usual_classes(model_type: str, prefix: str) -> dict[str, FusedPart]:
    """The classes of a dense decoder in `transformers`, whose names begin with `prefix`."""
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    return {f"{module}.{prefix}{ending}": part for ending, part in _PARTS.items()}
