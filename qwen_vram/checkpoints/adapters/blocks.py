"""Block-diagonal factors of BD-LoRA."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """The factors that are block-diagonal. Source: peft 0.21.2, tuners/lora/variants.py.

    Attributes:
        number: Number of blocks of such a factor. The file holds the blocks side by side.
        in_a: Parts of paths of the modules whose `lora_A` is such a factor.
        in_b: The same for `lora_B`.
        strict: PEFT refuses a module that neither names.
    """

    number: int
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]
    strict: bool

    def has_a(self, module: str) -> bool:
        """Tell if `lora_A` of `module`, a path, is such a factor."""
        return any(part in module for part in self.in_a)

    def has_b(self, module: str) -> bool:
        """Tell if `lora_B` of `module`, a path, is such a factor, which then has no bias."""
        return any(part in module for part in self.in_b)

    def name(self, module: str) -> bool:
        """Tell if `lora_A` or `lora_B` of `module`, a path, is such a factor."""
        return self.has_a(module) or self.has_b(module)

    def of(self, module: str) -> tuple[int, int]:
        """Return the numbers of blocks of `lora_A` and `lora_B` of `module`; a plain factor is one block."""
        return self.number if self.has_a(module) else 1, self.number if self.has_b(module) else 1

    def are_wrong(self, module: str) -> str:
        """Return why PEFT refuses the settings for `module`; empty if it does not."""
        if self.has_a(module) and self.has_b(module):
            return f"use_bdlora names {module} in target_modules_bd_a and in target_modules_bd_b"
        if self.strict and not self.name(module):
            return f"use_bdlora does not name {module}, and its match_strict is true"
        return ""
