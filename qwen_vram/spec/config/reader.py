"""Checked values of a config.json, with the defaults of `transformers` for its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vram.dtypes import BF16, BY_CONFIG
from qwen_vram.errors import ConfigError
from qwen_vram.spec.config.keys import LARGEST, Keys, value_of
from qwen_vram.spec.quantization import (
    method_of,
    quantization_of,
    settings_of,
    skipped_modules,
    skips,
    stored_format,
)


class ConfigReader:
    """Reads one config.json's object.

    Args:
        keys: The keys of its family.

    Raises:
        ConfigError: a model that is not a language model, or MLX's quantization.
    """

    def __init__(self, config: Mapping[str, object], source: str, keys: Keys) -> None:
        self.config = config
        self.source = source
        self.keys = keys
        self._check_kind()

    def error(self, what: str) -> ConfigError:
        """The error for an impossible value."""
        return ConfigError(f"{self.source}: {what}; check the file against the published one", source=self.source)

    def size(self, key: str) -> int:
        """A positive integer."""
        value = value_of(self.keys, self.config, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
            raise self.error(f"{key} must be a positive integer of at most {LARGEST}, got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """A boolean."""
        return bool(value_of(self.keys, self.config, key))

    def key_value_heads(self, heads: int) -> int:
        """`num_key_value_heads`: equal to `heads` if config.json has null, the default if it lacks the key.

        Raises:
            ConfigError: it does not divide `heads`.
        """
        given = value_of(self.keys, self.config, "num_key_value_heads")
        key_value_heads = heads if given is None else self.size("num_key_value_heads")
        if heads % key_value_heads:
            raise self.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value_heads}")
        return key_value_heads

    def head_dim(self, hidden_size: int, heads: int) -> int:
        """`head_dim`; if it is missing, the family's default, or else `hidden_size` divided by the heads.

        Raises:
            ConfigError: the heads do not divide `hidden_size`, or the size of a head is odd.
        """
        given = value_of(self.keys, self.config, "head_dim")
        if given is None and hidden_size % heads:
            raise self.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden_size // heads if given is None else self.size("head_dim")
        if head_dim % 2:
            raise self.error(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
        return head_dim

    def dtype(self) -> str:
        """The plain dtype, by its name here; bf16 if config.json names no dtype that a model can run in."""
        given = BY_CONFIG.get(str(self.config.get("dtype") or self.config.get("torch_dtype")), BF16)
        return given.name or BF16.name

    def stored(self) -> dict[str, Any]:
        """`stored_format` and `stored_head` of a checkpoint that bitsandbytes quantized; empty for plain dtypes."""
        quantization = quantization_of(self.config)
        if quantization is None:
            return {}
        name, in_headers = stored_format(quantization)
        method = method_of(quantization)
        if name is None:
            from qwen_vram.spec.quantizers import method_name, not_loaded

            reason = not_loaded(quantization, method or method_name(quantization), None)
            raise ConfigError(f"{self.source}: {reason}", source=self.source)
        if in_headers:
            raise ConfigError(
                f"{self.source}: the checkpoint is already quantized by {method!r}, which is not counted from a config "
                "alone: its safetensors headers say the bytes; pass the checkpoint's folder or its hub id",
                source=self.source,
            )
        # A tied head is the embedding matrix, which is in 16 bits even if the list does not name it.
        quantized = not skips(skipped_modules(settings_of(quantization)), "lm_head")
        return {"stored_format": name, "stored_head": quantized and not self.flag("tie_word_embeddings")}

    def _check_kind(self) -> None:
        """Refuse models that are not causal language models, and MLX's quantization, which has its own block."""
        named = self.config.get("architectures")
        kinds = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        if kinds and not any(str(kind).endswith("ForCausalLM") for kind in kinds):
            raise ConfigError(
                f"{self.source}: architectures {', '.join(map(str, kinds))} is no language model: it scores, sorts "
                "or embeds texts and has no head that writes tokens; use a checkpoint whose architectures end in "
                "ForCausalLM, or run this one with transformers itself",
                source=self.source,
            )
        if self.config.get("is_causal") not in (None, True):
            raise ConfigError(
                f"{self.source}: is_causal {self.config['is_causal']!r}: every token attends to all others, as in "
                "embedding models, so that it is no language model and cannot write tokens; run it with transformers "
                "or sentence-transformers",
                source=self.source,
            )
        settings = self.config.get("quantization")
        if isinstance(settings, Mapping) and "group_size" in settings and "bits" in settings:
            raise ConfigError(
                f"{self.source}: MLX quantized this checkpoint for Apple's GPUs (its key 'quantization'), and no other "
                "library reads that; use the 16-bit checkpoint that it was made from, and weights='nf4' or 'int4'",
                source=self.source,
            )
