"""layer_replication: which of the base's layers an adapter's model is made of."""

from __future__ import annotations

from typing import NamedTuple


class Replication(NamedTuple):
    """The layers of the adapter's model. Source: peft 0.21.2, tuners/tuners_utils.py, replicate_layers.

    Attributes:
        pairs: Numbers of the base's layers, from the first up to the second without it, one range after the other.
    """

    pairs: tuple[tuple[int, int], ...]

    @property
    def _ranges(self) -> list[range]:
        """The ranges that are not empty."""
        return [range(*pair) for pair in self.pairs if range(*pair)]

    def fits(self, layers: int) -> bool:
        """Tell whether a base of `layers` layers has all of these."""
        return all(one.start >= 0 and one.stop <= layers for one in self._ranges)

    def order(self) -> tuple[int, ...]:
        """The number of the base's layer, for each of the model's."""
        return tuple(number for one in self._ranges for number in one)

    def is_the_base(self, layers: int) -> bool:
        """Tell whether these are the base's `layers` layers, each once and in their order."""
        return self.fits(layers) and self.order() == tuple(range(layers))

    def __str__(self) -> str:
        """Spell the setting as the file has it."""
        return str([list(pair) for pair in self.pairs])
