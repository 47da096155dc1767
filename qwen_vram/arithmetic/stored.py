"""Checkpoints that are quantized already: the format that config.json names, and their tensors' bytes by part.

Knows neither shapes nor files; `stored_checkpoint` makes this of a config.json and its safetensors headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from qwen_vram.arithmetic.storage import FORMATS, FormatName

# quant_method of config.json -> storage format. Bits, groups and skipped modules vary, so that only headers say bytes.
METHODS: dict[str, FormatName] = {
    "gptq": "gptq",
    "awq": "awq",
    "fp8": "fp8-block",
    "compressed-tensors": "compressed-tensors",
}
# What this library writes itself, of formats on torch's own operators.
OWN_METHOD = "qwen_vram"
_FOUR_BIT: dict[tuple[object, bool], FormatName] = {
    ("nf4", True): "nf4",
    ("nf4", False): "nf4-plain",
    ("fp4", True): "fp4",
    ("fp4", False): "fp4-plain",
}


class StoredTensor(NamedTuple):
    """A tensor as the loaded model keeps it: its name in the checkpoint, and its bytes."""

    name: str
    nbytes: int


class Stored(NamedTuple):
    """What a quantized checkpoint holds, by part, each part in the order of its tensors' names. Bytes are exact.

    Attributes:
        embedding: The token table.
        layers: One entry for each decoder layer.
        norm: The last norm.
        head: The head; empty where it is the embedding's tensor.
    """

    embedding: tuple[StoredTensor, ...]
    layers: tuple[tuple[StoredTensor, ...], ...]
    norm: tuple[StoredTensor, ...]
    head: tuple[StoredTensor, ...]

    def matrix(self, name: str) -> int:
        """Bytes of a weight with all that its format keeps beside it, `name` as config.json's model has it."""
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
        """The layers that take device memory while `streamed` of them pass through `slots`.

        Layers may differ in size, and which are streamed is not known here: the smallest are taken to be away, and a
        slot holds the largest.
        """
        away = sorted(self.layers, key=size)[:streamed]
        staying = list(self.layers)
        for layer in away:
            staying.remove(layer)
        return staying + [max(self.layers, key=size)] * slots

    def on_host(self, streamed: int) -> int:
        """Bytes of the layers that stay on the host: the largest, where layers differ."""
        return sum(sorted(map(size, self.layers), reverse=True)[:streamed])

    def on_disk(self, layers: int, smallest: int) -> tuple[int, int]:
        """Bytes of disk layers in tensors below `smallest`, and in all others: the most, where layers differ."""
        small = [sum(tensor.nbytes for tensor in layer if tensor.nbytes < smallest) for layer in self.layers]
        large = [size(layer) - less for layer, less in zip(self.layers, small, strict=True)]
        return sum(sorted(small, reverse=True)[:layers]), sum(sorted(large, reverse=True)[:layers])


def size(tensors: tuple[StoredTensor, ...]) -> int:
    """Bytes of some tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def quantization_of(config: Mapping[str, object]) -> object:
    """What config.json says of its quantization, under its present or its old key; `None` for plain dtypes."""
    present = config.get("quantization_config")
    return config.get("compression_config") if present is None else present


def stored_format(quantization: object) -> tuple[FormatName | None, bool]:
    """The storage format that a `quantization_config` names, and whether only the headers say its bytes.

    `None` where it is none that is counted. A checkpoint of bitsandbytes or of this library itself is counted from its
    config alone, unless modules beside the head are left in 16 bits.
    """
    settings = quantization if isinstance(quantization, Mapping) else {}
    method = settings.get("quant_method")
    if method == OWN_METHOD:
        own = settings.get("weights")
        known = isinstance(own, str) and own in FORMATS and FORMATS[own].library == "torch"
        return (cast("FormatName", own) if known else None), bool(set(skipped_modules(settings)) - {"lm_head"})
    if method != "bitsandbytes":
        return (METHODS.get(method), True) if isinstance(method, str) else (None, False)
    name: FormatName | None = None
    if settings.get("load_in_8bit"):
        name = "int8"
    elif settings.get("load_in_4bit"):
        double = bool(settings.get("bnb_4bit_use_double_quant"))
        name = _FOUR_BIT.get((settings.get("bnb_4bit_quant_type"), double))
    return name, bool(set(skipped_modules(settings)) - {"lm_head"})


def skipped_modules(settings: Mapping[str, object]) -> list[str]:
    """The modules that were left as they were; the head alone where config.json does not say."""
    skipped = settings.get("llm_int8_skip_modules", settings.get("modules_to_not_convert"))
    return [str(name) for name in cast("list[object]", skipped)] if isinstance(skipped, list) else ["lm_head"]
