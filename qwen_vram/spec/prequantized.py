"""Bytes of a prequantized checkpoint's tensors, by part.

It uses neither shapes nor files: `checkpoints.tensors.prequantized` reads the bytes from config.json and the headers.
"""

from __future__ import annotations

from typing import NamedTuple


class StoredTensor(NamedTuple):
    """A tensor as the loaded model has it: its name in the checkpoint, and its bytes."""

    name: str
    nbytes: int


class Stored(NamedTuple):
    """The tensors of a quantized checkpoint by part, each part in the order of its tensors' names. Bytes are exact.

    Attributes:
        embedding: The token embeddings.
        layers: One entry for each decoder layer.
        norm: The last norm.
        head: The head; empty if it is the embedding's tensor.
    """

    embedding: tuple[StoredTensor, ...]
    layers: tuple[tuple[StoredTensor, ...], ...]
    norm: tuple[StoredTensor, ...]
    head: tuple[StoredTensor, ...]

    @property
    def head_bytes(self) -> int:
        """Bytes of the head's tensors."""
        return size(self.head)

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer."""
        return max(map(size, self.layers))

    def matrix(self, name: str) -> int:
        """Bytes of a weight with its scales and other tensors; `name` is its name in the model of config.json."""
        module = name.rpartition(".")[0]
        beside = (tensor for part in (self.embedding, *self.layers, self.norm, self.head) for tensor in part)
        if name.endswith(".bias"):
            return sum(tensor.nbytes for tensor in beside if tensor.name == name)
        return sum(
            tensor.nbytes
            for tensor in beside
            if tensor.name.startswith(f"{module}.") and not tensor.name.endswith(".bias")
        )

    def on_device(self, streamed: int, slots: int) -> list[tuple[StoredTensor, ...]]:
        """The layers that take device memory while `streamed` of them pass through `slots` slots.

        Layers may differ in size, and the numbers of the streamed ones are not known here. The smallest are assumed to
        be streamed, and a slot holds the largest.
        """
        away = sorted(self.layers, key=size)[:streamed]
        staying = list(self.layers)
        for layer in away:
            staying.remove(layer)
        return staying + [max(self.layers, key=size)] * slots

    def on_host(self, streamed: int) -> int:
        """Bytes of the layers that stay on the host; of the largest ones if layers differ."""
        return sum(sorted(map(size, self.layers), reverse=True)[:streamed])

    def on_disk(self, layers: int, smallest: int) -> tuple[int, int]:
        """Bytes of disk layers in tensors below `smallest` bytes, and in all others; the most if layers differ."""
        small = [sum(tensor.nbytes for tensor in layer if tensor.nbytes < smallest) for layer in self.layers]
        large = [size(layer) - less for layer, less in zip(self.layers, small, strict=True)]
        return sum(sorted(small, reverse=True)[:layers]), sum(sorted(large, reverse=True)[:layers])


def size(tensors: tuple[StoredTensor, ...]) -> int:
    """Bytes of some tensors in total."""
    return sum(tensor.nbytes for tensor in tensors)
