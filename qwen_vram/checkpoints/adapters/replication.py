"""Order of the base's layers in an adapter's model (`layer_replication`)."""

from __future__ import annotations

from typing import NamedTuple


class Replication(NamedTuple):
    """The layers of the adapter's model. Source: peft 0.21.2, tuners/tuners_utils.py, replicate_layers.

    Attributes:
        pairs: Ranges of the base's layers in their order: the first layer, and the layer after the last.
    """

    pairs: tuple[tuple[int, int], ...]

    @property
    def _ranges(self) -> list[range]:
        """The ranges that are not empty."""
        return [range(*pair) for pair in self.pairs if range(*pair)]

    def fits(self, layers: int) -> bool:
        """Tell if a base of `layers` layers has all of these."""
        return all(one.start >= 0 and one.stop <= layers for one in self._ranges)

    def order(self) -> tuple[int, ...]:
        """Return the number of the base's layer for each layer of the model."""
        return tuple(number for one in self._ranges for number in one)

    def is_the_base(self, layers: int) -> bool:
        """Tell if these are the base's `layers` layers, each once and in their order."""
        return self.fits(layers) and self.order() == tuple(range(layers))

    def __str__(self) -> str:
        """Return the setting as the file spells it."""
        return str([list(pair) for pair in self.pairs])
