"""Qwen3: dense decoders with norms on queries and keys."""

from __future__ import annotations

from qwen_vram.spec.config import keys
from qwen_vram.spec.config.keys import SIZE, Key
from qwen_vram.spec.config.reader import ConfigReader
from qwen_vram.spec.families import qwen2
from qwen_vram.spec.family import Family, dense_layers, usual_classes
from qwen_vram.spec.layers import ATTENTION_MATRICES, LayerSpec
from qwen_vram.spec.rope import RopeRules

# Source: transformers 5.23, Qwen3Config; a test compares it with this table.
KEYS = {
    **qwen2.KEYS,
    "head_dim": Key(keys.integer, SIZE, 128),
    "attention_bias": Key(keys.flag, "true or false", False),
}
# Qwen3's 40,960 positions are 32,768 that it was trained on and 8,192 for a prompt.
# Source: Qwen3's model cards, "Processing Long Texts".
_NATIVE = {40_960: 32_768}


def _layers(reader: ConfigReader) -> tuple[LayerSpec, ...]:
    biased = ATTENTION_MATRICES if reader.flag("attention_bias") else ()
    return dense_layers(reader, publisher="Qwen", biased=biased, head_norms=True)


FAMILY = Family(
    names=("Qwen3",),
    keys=KEYS,
    layers=_layers,
    refusal=qwen2.sliding_windows,
    rope=RopeRules(publisher="Qwen", yarn=qwen2.LARGEST_YARN_FACTOR, native=_NATIVE),
    fused=usual_classes("qwen3", "Qwen3"),
)
