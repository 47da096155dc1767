"""Reader of adapter_config.json, which checks every setting.

Settings that no known trainer writes are not guessed at: `LoraSettings.unmergeable` names those that are switched on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from qwen_vram.checkpoints.adapters.blocks import Blocks
from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import CONFIG
from qwen_vram.checkpoints.adapters.replication import Replication
from qwen_vram.checkpoints.adapters.settings import LoraSettings
from qwen_vram.checkpoints.adapters.targets import Targets
from qwen_vram.checkpoints.files.local import parse_config
from qwen_vram.errors import ConfigError

# Initializations that leave the base as it is. Source: peft 0.21.2, tuners/lora/layer.py, LoraLayer.update_layer.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Initializations that changed the base before training. PEFT repeats the first two exactly when it loads them onto the
# same 16-bit base. The others depend on random numbers or data that are not in the file.
_REPEATABLE_INITS = ("pissa", "olora")
_BASE_CHANGING_INITS = (*_REPEATABLE_INITS, "corda", "loftq", "lora_ga")

# Settings with which the adapter is not a low-rank update of one matrix, or belongs to another base.
_REFUSED = {
    "arrow_config": "Arrow chooses among adapters for every token",
    "megatron_config": "the adapter is split over Megatron's ranks",
}
# The same for the merge. PEFT runs them beside the base, if their tensors have the shapes of its modules. It groups
# inputs only for GPTQ's matrices, and does not know ms-swift's use_qa_lora, use_merged_linear and enable_lora.
_NOT_MERGED = {
    "use_qalora": "QALoRA groups the inputs of each matrix",
    "use_qa_lora": "QA-LoRA groups the inputs of each matrix",
    "use_merged_linear": "several projections share one matrix",
    "enable_lora": "several projections share one matrix",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "kasa_config": "KaSA truncates the base",
    "target_parameters": "parameters inside modules (mixtures of experts) are adapted",
}
_WITH_PEFT = "merge it with PEFT itself (merge_and_unload), and pass the result as the model"
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "base_model_name_or_path",
    "alora_invocation_tokens", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "layer_replication",
}  # fmt: skip
# Settings of training and saving, which do not change the adapter's arithmetic. fan_in_fan_out is for GPT-2's Conv1D:
# PEFT switches it off for nn.Linear and never reads it for nn.Embedding. The last line has further keys of ms-swift and
# of PEFT before 0.3. VeLoRA and MonteCLoRA are plain LoRA outside training: VeLoRA compresses the tensors kept for the
# backward pass, and MonteCLoRA draws weights at random in training mode. Source: peft 0.21.2, tuners/lora/variants.py.
_IGNORED = {
    "lora_dropout", "fan_in_fan_out", "task_type", "inference_mode", "auto_mapping", "revision", "peft_version",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "_name_or_path", "velora_config", "monteclora_config",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "swift_type", "model_key_mapping", "merge_weights",
}  # fmt: skip
# The same settings of any other trainer, by the words in their names.
_ABOUT_TRAINING = re.compile(
    r"(^|_)(lr|learning|dropout|dtype|seed|optim\w*|scheduler|warmup|decay|epochs?|steps?|train\w*|dataset|loss|"
    r"version|date|time|author|license|tags|framework|unsloth\w*|swift\w*|gradient\w*|checkpoint\w*)(_|$)"
)
_OFF: tuple[object, ...] = (None, False, [], {}, "", 0)
# Keys that are in a model's config.json and not in adapter_config.json.
_MODELS_KEYS = ("model_type", "architectures", "hidden_size", "num_hidden_layers")


def read_settings(folder: Path) -> LoraSettings:
    """Read and check the settings of the adapter in `folder`.

    Raises:
        AdapterError: the file is missing or broken, is not of LoRA, or describes no low-rank update.
    """
    path = folder / CONFIG
    try:
        config = parse_config(path.read_bytes().decode("utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise AdapterError(f"cannot read {str(path)!r}: {error}", path=str(path)) from error
    return _Reader(config, path).settings()


class _Reader:
    """Reader of checked values in the object of an adapter_config.json."""

    def __init__(self, config: Mapping[str, object], path: Path) -> None:
        self.config = config
        self.path = path

    def error(self, what: str) -> AdapterError:
        return AdapterError(f"{str(self.path)!r}: {what}", path=str(self.path))

    def on(self, key: str) -> bool:
        """Tell if the file switches `key` on."""
        return self.config.get(key) not in _OFF

    def settings(self) -> LoraSettings:
        self.refuse()
        bias = self.config.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise self.error(f"bias is {bias!r}; none, all and lora_only are known")
        init = self.init()
        return LoraSettings(
            r=int(self.number("r", self.config.get("r", 8))),
            lora_alpha=self.number("lora_alpha", self.config.get("lora_alpha", 8)),
            rank_pattern={key: int(value) for key, value in self.pattern("rank_pattern").items()},
            alpha_pattern=self.pattern("alpha_pattern"),
            use_rslora=bool(self.config.get("use_rslora")),
            use_dora=bool(self.config.get("use_dora")),
            lora_bias=bool(self.config.get("lora_bias")),
            bias=str(bias),
            targets=self.targets(),
            modules_to_save=self.names("modules_to_save"),
            token_indices=self.token_indices(),
            ensure_weight_tying=bool(self.config.get("ensure_weight_tying")),
            trained_on=str(self.config.get("base_model_name_or_path") or ""),
            task_type=str(self.config.get("task_type") or ""),
            activated=self.on("alora_invocation_tokens"),
            mutates_base=self.mutates_base(init),
            use_kasa=self.on("kasa_config"),
            groups_inputs=self.on("use_qalora") or self.on("use_qa_lora"),
            blocks=self.blocks(),
            replication=self.replication(),
            unmergeable=self.unmergeable(init),
        )

    def refuse(self) -> None:
        """Refuse by name other methods than LoRA, and settings that are no low-rank update."""
        peft_type = self.config.get("peft_type")
        models = [key for key in _MODELS_KEYS if key in self.config]
        if peft_type is None and models:
            raise self.error(
                f"this is a model's config.json, not an adapter's (it holds {', '.join(models)} and no peft_type); put "
                f"back the {CONFIG} that PEFT's save_pretrained() wrote beside the adapter's weights"
            )
        if peft_type != "LORA":
            raise self.error(
                f"peft_type is {peft_type!r}; only LORA can be merged here, so merge it with PEFT itself "
                "(merge_and_unload), and pass the result as the model"
            )
        for key, why in _REFUSED.items():
            if self.on(key):
                raise self.error(f"{key} is set: {why}, so it cannot be merged exactly; {_WITH_PEFT}")

    def init(self) -> str:
        """Return the initialization's name in lower case; `""` for PEFT's default.

        Raises:
            AdapterError: it is not known, or made a change to the base that cannot be repeated.
        """
        init = self.config.get("init_lora_weights", True)
        name = init.lower() if isinstance(init, str) else ""
        if name.startswith(_BASE_CHANGING_INITS):
            if name not in _REPEATABLE_INITS:
                raise self.error(self.changed_base(init))
        elif init not in _HARMLESS_INITS:
            known = ", ".join(str(value) for value in _HARMLESS_INITS)
            raise self.error(f"init_lora_weights is {init!r}, which is not known; {known} leave the base as it is")
        return name

    def changed_base(self, init: object) -> str:
        return (
            f"init_lora_weights is {init!r}, which changed the base before training; save the adapter again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which turns it into a plain LoRA; "
            "or, if the base here is the changed one that training saved, set init_lora_weights to true"
        )

    def mutates_base(self, init: str) -> str:
        """Return the setting with which PEFT changes the base when it loads the adapter; empty without one."""
        if self.on("kasa_config"):
            return "kasa_config"
        return "init_lora_weights" if init in _REPEATABLE_INITS else ""

    def blocks(self) -> Blocks | None:
        """Return BD-LoRA's blocks; `None` without them."""
        if not self.on("use_bdlora"):
            return None
        given = self.config["use_bdlora"]
        if not isinstance(given, dict):
            raise self.error(f"use_bdlora must be an object with nblocks, got {given!r}")
        inside = _Reader(given, self.path)
        return Blocks(
            number=int(inside.number("nblocks", given.get("nblocks", 1))),
            in_a=inside.names("target_modules_bd_a"),
            in_b=inside.names("target_modules_bd_b"),
            strict=bool(given.get("match_strict", True)),
        )

    def replication(self) -> Replication | None:
        """Return the order of the base's layers in the adapter's model; `None` if it is not set."""
        if not self.on("layer_replication"):
            return None
        given = self.config["layer_replication"]
        pairs = []
        for pair in given if isinstance(given, list) else [given]:
            if not isinstance(pair, list) or [type(end) for end in pair] != [int, int]:
                raise self.error(f"layer_replication must be a list of pairs of layer numbers, got {given!r}")
            pairs.append((pair[0], pair[1]))
        if not any(first < following for first, following in pairs):
            raise self.error(f"layer_replication must name at least one layer, got {given!r}")
        return Replication(tuple(pairs))

    def unmergeable(self, init: str) -> str:
        """Return why the adapter cannot be merged exactly; empty if it can."""
        if init in _REPEATABLE_INITS:
            return self.changed_base(self.config["init_lora_weights"])
        if self.on("alora_invocation_tokens"):
            return (
                "alora_invocation_tokens is set: an activated LoRA acts on part of the text only, so it cannot be "
                "merged; run it beside its base: qv.load(base, adapter=...)"
            )
        for key, why in _NOT_MERGED.items():
            if self.on(key):
                return f"{key} is set: {why}, so it cannot be merged exactly; {_WITH_PEFT}"
        known = _READ | _IGNORED | set(_REFUSED) | set(_NOT_MERGED)
        unknown = [key for key in self.config if key not in known and self.on(key) and not _ABOUT_TRAINING.search(key)]
        if unknown:
            return (
                f"{', '.join(unknown)} is set, which this version does not know and will not guess; merge it with PEFT "
                "itself, update qwen-vram, or remove the key from the file if it has no effect on the result"
            )
        return ""

    def number(self, key: str, value: object) -> float:
        """Return `value`, a positive, finite number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(f"{key} must be a positive number, got {value!r}")
        return value

    def pattern(self, key: str) -> dict[str, float]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(f"{key} must be an object of patterns, got {value!r}")
        for name in value:
            self.expression(key, name)
        return {str(name): self.number(f"{key}[{name!r}]", number) for name, number in value.items()}

    def expression(self, key: str, value: str) -> str:
        """Return `value`, a regular expression."""
        try:
            re.compile(value)
        except re.error as error:
            raise self.error(f"{key} has {value!r}, which is not a regular expression: {error}") from error
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.error(f"{key} must be a list of names, got {value!r}")
        return tuple(cast("list[str]", value))

    def names_or_expression(self, key: str) -> tuple[str, ...] | str | None:
        value = self.config.get(key)
        if isinstance(value, str):
            return self.expression(key, value) if value != "all-linear" else value
        return None if value is None else self.names(key)

    def targets(self) -> Targets:
        layers = self.config.get("layers_to_transform")
        numbers = [layers] if type(layers) is int else layers or []
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise self.error(f"layers_to_transform must be layer numbers, got {layers!r}")
        pattern = self.config.get("layers_pattern") or []
        return Targets(
            modules=self.names_or_expression("target_modules"),
            excluded=self.names_or_expression("exclude_modules") or (),
            saved=tuple(self.expression("modules_to_save", name) for name in self.names("modules_to_save")),
            layers=tuple(numbers),
            layers_pattern=(pattern,) if isinstance(pattern, str) else self.names("layers_pattern"),
            weights=self.named_weights(),
        )

    def named_weights(self) -> tuple[str, ...]:
        """Return the modules whose weights the settings name as parameters."""
        names = self.names("target_parameters")
        tables = [name for name in names if name.endswith("embed_tokens.weight")]
        if tables and self.init() in _REPEATABLE_INITS:
            raise self.error(
                f"target_parameters names {tables[0]!r}, and init_lora_weights is {self.config['init_lora_weights']!r},"
                f" which changed the token table before training; {_WITH_PEFT}"
            )
        return tuple(name.removesuffix(".weight") for name in names if name.endswith(".weight"))

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
