"""Qwen2 and Qwen2.5: dense decoders with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_vram.spec.config import keys
from qwen_vram.spec.config.keys import SIZE, Key
from qwen_vram.spec.config.reader import ConfigReader
from qwen_vram.spec.family import Family, dense_layers, usual_classes
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.rope import RopeRules

# Source: transformers 5.23, Qwen2Config; a test compares it with this table.
KEYS = {
    "vocab_size": Key(keys.integer, SIZE, 151_936),
    "hidden_size": Key(keys.integer, SIZE, 4_096),
    "intermediate_size": Key(keys.integer, SIZE, 22_016),
    "num_hidden_layers": Key(keys.integer, SIZE, 32),
    "num_attention_heads": Key(keys.integer, SIZE, 32),
    "num_key_value_heads": Key(keys.or_null(keys.integer), f"{SIZE}, or null", 32),
    "hidden_act": Key(keys.text, "a text", "silu"),
    "max_position_embeddings": Key(keys.integer, SIZE, 32_768),
    "initializer_range": Key(keys.real, "a number with a decimal point, such as 0.02", 0.02),
    "rms_norm_eps": Key(keys.real, "a number with a decimal point or an exponent, such as 1e-06", 1e-6),
    "use_cache": Key(keys.flag, "true or false", True),
    "tie_word_embeddings": Key(keys.flag, "true or false", False),
    "rope_parameters": Key(keys.or_null(keys.mapping), "an object or null", None),
    "use_sliding_window": Key(keys.flag, "true or false", False),
    "sliding_window": Key(keys.or_null(keys.integer), "an integer or null", 4_096),
    "max_window_layers": Key(keys.integer, "an integer", 28),
    "layer_types": Key(keys.or_null(keys.list_of(keys.text)), "a list of texts or null", None),
    "attention_dropout": Key(keys.number, "a number", 0.0),
    "pad_token_id": Key(keys.or_null(keys.integer), "an integer or null", None),
    "bos_token_id": Key(keys.or_null(keys.integer), "an integer or null", None),
    "eos_token_id": Key(
        keys.or_null(keys.either(keys.integer, keys.list_of(keys.integer))), "an integer, a list of integers or null",
        None,
    ),
}  # fmt: skip
# Source: Qwen2.5's model cards, "Processing Long Texts".
LARGEST_YARN_FACTOR = 4


def sliding_windows(config: Mapping[str, object]) -> str:
    """The text for layers that attend to a window only; empty if every layer attends to all tokens."""
    kinds = config.get("layer_types") or ()
    other = sorted({str(kind) for kind in kinds if kind != "full_attention"}) if isinstance(kinds, list) else []
    if config.get("use_sliding_window") is True or other == ["sliding_attention"]:
        return (
            "sliding-window attention is switched on, which this library does not count; "
            "set use_sliding_window to false"
        )
    return f"layer_types has {', '.join(other)}; full_attention alone is counted" if other else ""


def _layers(reader: ConfigReader) -> tuple[LayerSpec, ...]:
    return dense_layers(reader, publisher="Qwen", biased=("q_proj", "k_proj", "v_proj"))


FAMILY = Family(
    names=("Qwen2", "Qwen2.5"),
    keys=KEYS,
    layers=_layers,
    refusal=sliding_windows,
    rope=RopeRules(publisher="Qwen", yarn=LARGEST_YARN_FACTOR),
    fused=usual_classes("qwen2", "Qwen2"),
)
