"""Llama and models of its architecture: dense decoders, mostly without biases."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_vram.spec.config import keys
from qwen_vram.spec.config.keys import SIZE, Key
from qwen_vram.spec.config.reader import ConfigReader
from qwen_vram.spec.family import Family, dense_layers, usual_classes
from qwen_vram.spec.layers import ATTENTION_MATRICES, MLP_MATRICES, LayerSpec
from qwen_vram.spec.rope import RopeRules


def _share(value: object) -> bool:
    return keys.real(value) and 0 <= value <= 1  # type: ignore[operator]


# Source: transformers 5.23, LlamaConfig; a test compares it with this table.
KEYS = {
    "vocab_size": Key(keys.integer, SIZE, 32_000),
    "hidden_size": Key(keys.integer, SIZE, 4_096),
    "intermediate_size": Key(keys.integer, SIZE, 11_008),
    "num_hidden_layers": Key(keys.integer, SIZE, 32),
    "num_attention_heads": Key(keys.integer, SIZE, 32),
    "num_key_value_heads": Key(keys.or_null(keys.integer), f"{SIZE}, or null", None),
    "hidden_act": Key(keys.text, "a text", "silu"),
    "max_position_embeddings": Key(keys.integer, SIZE, 2_048),
    "initializer_range": Key(_share, "a number from 0.0 to 1.0 with a decimal point", 0.02),
    "rms_norm_eps": Key(keys.real, "a number with a decimal point or an exponent, such as 1e-06", 1e-6),
    "use_cache": Key(keys.flag, "true or false", True),
    "pad_token_id": Key(keys.or_null(keys.integer), "an integer or null", None),
    "bos_token_id": Key(keys.or_null(keys.integer), "an integer or null", 1),
    "eos_token_id": Key(
        keys.or_null(keys.either(keys.integer, keys.list_of(keys.integer))), "an integer, a list of integers or null", 2
    ),
    "pretraining_tp": Key(keys.or_null(keys.integer), "an integer or null", 1),
    "tie_word_embeddings": Key(keys.flag, "true or false", False),
    "rope_parameters": Key(keys.or_null(keys.mapping), "an object or null", None),
    "attention_bias": Key(keys.flag, "true or false", False),
    "attention_dropout": Key(keys.or_null(keys.number), "a number or null", 0.0),
    "mlp_bias": Key(keys.flag, "true or false", False),
    "head_dim": Key(keys.or_null(keys.integer), f"{SIZE}, or null", None),
}


def _wrong(config: Mapping[str, object]) -> str:
    """The text for a hidden size that the heads do not divide, which `transformers` refuses despite `head_dim`."""
    hidden_size, heads = (keys.value_of(KEYS, config, name) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(hidden_size, int) and isinstance(heads, int) and (not heads or hidden_size % heads):
        return f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, as transformers asks for"
    return ""


def _layers(reader: ConfigReader) -> tuple[LayerSpec, ...]:
    attention = ATTENTION_MATRICES if reader.flag("attention_bias") else ()
    mlp = MLP_MATRICES if reader.flag("mlp_bias") else ()
    return dense_layers(reader, publisher="Llama", biased=(*attention, *mlp))


FAMILY = Family(
    names=("Llama",),
    keys=KEYS,
    layers=_layers,
    wrong=_wrong,
    # Llama 3.1 and 3.2 were trained with these positions: max_position_embeddings is their whole length.
    # Source: https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json, rope_scaling.
    rope=RopeRules(publisher="Meta", trained=("llama3",)),
    fused=usual_classes("llama", "Llama"),
)
