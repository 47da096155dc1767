"""adapter_config.json: the settings that change what an adapter computes, and those that cannot be merged exactly.

Only settings that this file knows are believed: one that a newer PEFT added and that is switched on is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qwen_vram.errors import ConfigError
from qwen_vram.files.local import parse_config
from qwen_vram.lora.errors import AdapterError

CONFIG = "adapter_config.json"

# Initializations that leave the base as it is. Source: peft 0.21.2, tuners/lora/layer.py, LoraLayer.update_layer.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# What the adapter computes is not a low-rank update of one matrix, or the base it belongs to is another one.
_REFUSED = {
    "use_qalora": "QALoRA groups the inputs of each matrix",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow chooses among adapters for every token",
    "alora_invocation_tokens": "an activated LoRA acts on part of the text only",
    "kasa_config": "KaSA truncates the base",
    "velora_config": "VeLoRA is not a plain low-rank update",
    "monteclora_config": "MonteCLoRA draws its weights at random",
    "layer_replication": "the adapter's layers are copies of the base's layers",
    "target_parameters": "parameters inside modules (mixtures of experts) are adapted",
    "megatron_config": "the adapter is split over Megatron's ranks",
}
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "base_model_name_or_path",
}  # fmt: skip
# Where the adapter sits is read from its tensors; how it was trained does not matter any more. fan_in_fan_out is for
# GPT-2's Conv1D: PEFT switches it off for nn.Linear and never reads it for nn.Embedding.
_IGNORED = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """What adapter_config.json says about the arithmetic.

    Attributes:
        rank_pattern: Rank by module pattern, in the file's order; likewise `alpha_pattern`.
        modules_to_save: Ends of the paths of modules that were trained whole.
        token_indices: Rows that were trained, by the end of their module's path.
        trained_on: The base that the adapter names.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    ensure_weight_tying: bool
    trained_on: str

    def saved_around(self, module: str) -> list[str]:
        """The paths that were trained whole, of `module`, a path such as `"model.norm"`, and those around it.

        PEFT compares the ends of paths, so that `"norm"` is `"model.layers.0.input_layernorm"` too.
        """
        parts = module.split(".")
        paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return [path for path in paths if path.endswith(self.modules_to_save)]

    def saves(self, module: str) -> bool:
        """Whether `module`, or one around it, was trained whole."""
        return bool(self.saved_around(module))

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of `module` that were trained, or `None`."""
        return next((rows for name, rows in self.token_indices.items() if module.endswith(name)), None)


def read_settings(folder: Path) -> LoraSettings:
    """The checked settings of the adapter in `folder`.

    Raises:
        AdapterError: the file is missing or broken, is not LoRA's, or asks for what cannot be merged exactly.
    """
    path = folder / CONFIG
    try:
        config = parse_config(path.read_bytes().decode("utf-8"), source=str(path))
    except FileNotFoundError:
        raise AdapterError(
            f"no {CONFIG} in {str(folder)!r}; point to the folder that PEFT's save_pretrained() wrote", path=str(path)
        ) from None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise AdapterError(f"cannot read {str(path)!r}: {error}", path=str(path)) from error
    return _Reader(config, path).settings()


class _Reader:
    """Reads checked values out of an adapter_config.json's object."""

    def __init__(self, config: Mapping[str, object], path: Path) -> None:
        self.config = config
        self.path = path

    def error(self, what: str) -> AdapterError:
        return AdapterError(f"{str(self.path)!r}: {what}", path=str(self.path))

    def settings(self) -> LoraSettings:
        self.refuse()
        bias = self.config.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise self.error(f"bias is {bias!r}; none, all and lora_only are known")
        return LoraSettings(
            r=int(self.number("r", self.config.get("r", 8))),
            lora_alpha=self.number("lora_alpha", self.config.get("lora_alpha", 8)),
            rank_pattern={key: int(value) for key, value in self.pattern("rank_pattern").items()},
            alpha_pattern=self.pattern("alpha_pattern"),
            use_rslora=bool(self.config.get("use_rslora")),
            use_dora=bool(self.config.get("use_dora")),
            lora_bias=bool(self.config.get("lora_bias")),
            bias=str(bias),
            modules_to_save=self.names("modules_to_save"),
            token_indices=self.token_indices(),
            ensure_weight_tying=bool(self.config.get("ensure_weight_tying")),
            trained_on=str(self.config.get("base_model_name_or_path") or ""),
        )

    def refuse(self) -> None:
        """Refuse by name what cannot be merged exactly."""
        peft_type = self.config.get("peft_type")
        if peft_type != "LORA":
            raise self.error(f"peft_type is {peft_type!r}; only LORA can be merged here, so merge it with PEFT itself")
        for key, why in _REFUSED.items():
            if self.config.get(key) not in (None, False, [], {}):
                raise self.error(f"{key} is set: {why}, so it cannot be merged exactly; merge it with PEFT itself")
        init = self.config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
            raise self.error(
                f"init_lora_weights is {init!r}, which changed the base before training; save the adapter again with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...), which turns it into a plain LoRA"
            )
        if init not in _HARMLESS_INITS:
            known = ", ".join(str(value) for value in _HARMLESS_INITS)
            raise self.error(f"init_lora_weights is {init!r}, which is not known; {known} leave the base as it is")
        unknown = [
            key
            for key, value in self.config.items()
            if key not in _READ | _IGNORED | set(_REFUSED) and value not in (None, False, [], {})
        ]
        if unknown:
            raise self.error(
                f"{', '.join(unknown)} is set, which this version does not know and will not guess; merge it with PEFT "
                "itself, or update qwen-vram"
            )

    def number(self, key: str, value: object) -> float:
        """A positive, finite number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(f"{key} must be a positive number, got {value!r}")
        return value

    def pattern(self, key: str) -> dict[str, float]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(f"{key} must be an object of patterns, got {value!r}")
        for name in value:
            try:
                re.compile(name)
            except re.error as error:
                raise self.error(f"{key} has {name!r}, which is not a regular expression: {error}") from error
        return {str(name): self.number(f"{key}[{name!r}]", number) for name, number in value.items()}

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.error(f"{key} must be a list of names, got {value!r}")
        return tuple(cast("list[str]", value))

    def token_indices(self) -> dict[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        value = self.config.get(key) or {}
        layers = value if isinstance(value, dict) else {"embed_tokens": value}
        found = {}
        for name, rows in layers.items():
            if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
                raise self.error(f"{key} must be lists of token ids, got {rows!r}")
            if len(set(rows)) != len(rows):
                raise self.error(f"{key} names a token twice, so that its row is not defined; train the adapter again")
            found[str(name)] = tuple(rows)
        return found
