"""Settings of adapter_config.json that change the adapter's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vram.checkpoints.adapters.blocks import Blocks
from qwen_vram.checkpoints.adapters.replication import Replication
from qwen_vram.checkpoints.adapters.targets import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings of adapter_config.json that change the arithmetic.

    Attributes:
        rank_pattern: Rank by module pattern, in the file's order; likewise `alpha_pattern`.
        targets: The modules that low-rank factors were trained for.
        modules_to_save: Ends of the paths of modules that were trained whole.
        token_indices: Rows that were trained, by the end of their module's path.
        trained_on: The base that the adapter names.
        task_type: PEFT's name of the kind of model, such as `"CAUSAL_LM"`; empty if the file has no such name.
        activated: The adapter acts on the tokens behind its invocation tokens only (an activated LoRA).
        mutates_base: The setting with which PEFT changes the base's weights when it loads the adapter, as before the
            training (PiSSA, OLoRA, KaSA). The weights must be on the device and not quantized. Empty without one.
        use_kasa: A diagonal is multiplied between the two factors, and the base's smallest singular values are cut off.
        groups_inputs: QALoRA's first factor takes groups of inputs.
        blocks: BD-LoRA's blocks; `None` without them.
        replication: The order of the base's layers in the adapter's model; `None` if the settings do not name one.
        unmergeable: Why the adapter cannot be merged exactly, in words; empty if it can.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    targets: Targets
    modules_to_save: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    ensure_weight_tying: bool
    trained_on: str
    task_type: str
    activated: bool
    mutates_base: str
    use_kasa: bool
    groups_inputs: bool
    blocks: Blocks | None
    replication: Replication | None
    unmergeable: str

    def key_of(self, module: str) -> str:
        """Return the path that PEFT compares with its patterns: that of the weight if the settings name the weight."""
        return f"{module}.weight" if self.targets.name_weight(module) else module

    def saved_around(self, module: str) -> list[str]:
        """Return the paths that were trained whole among `module`, such as `"model.norm"`, and the modules around it.

        PEFT compares the ends of paths, so `"norm"` also matches `"model.layers.0.input_layernorm"`.
        """
        parts = module.split(".")
        paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return [path for path in paths if path.endswith(self.modules_to_save)]

    def saves(self, module: str) -> bool:
        """Tell if `module`, or a module around it, was trained whole."""
        return bool(self.saved_around(module))

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Return the numbers of the rows of `module` that were trained, or `None`."""
        return next((rows for name, rows in self.token_indices.items() if module.endswith(name)), None)
