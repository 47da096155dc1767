"""Division of decoder layers into consecutive parts, one for each device.

Embeddings and head stay with the first and the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import Weight
from qwen_vram.spec.prequantized import Stored


def slices(architecture: Architecture, counts: Sequence[int]) -> Iterator[Architecture]:
    """Yield parts of `counts` layers, in order; each is an `Architecture` with only the weights of its own device.

    The first part has the token embeddings, and the last one the last norm and the head. A tied head is in the first
    part. The parts sum to the whole model, to the byte.

    Args:
        counts: Layers of each part, at least one; they sum to the layers of the model.

    Example:
        >>> from qwen_vram.spec.catalog import find
        >>> [part.num_parameters for part in slices(find("Qwen2.5-7B-Instruct"), (14, 14))]
        [3807806464, 3807810048]
    """
    assert min(counts) > 0
    assert sum(counts) == architecture.num_hidden_layers
    first = 0
    for count in counts:
        end = first + count
        part = replace(
            architecture,
            layers=architecture.layers[first:end],
            first_layer=first,
            layers_after=architecture.num_hidden_layers - end,
        )
        adapter = tuple(weight for weight in architecture.adapter_weights if _belongs(weight, part))
        yield replace(part, adapter_weights=adapter, stored=_stored(architecture.stored, part))
        first = end


def _belongs(weight: Weight, part: Architecture) -> bool:
    """Tell if an adapter's tensor belongs to a module of `part`."""
    names = weight.name.split(".")
    if names[:2] == ["model", "layers"]:
        return part.first_layer <= int(names[2]) < part.first_layer + part.num_hidden_layers
    return part.has_head if names[0] == "lm_head" else part.starts


def _stored(stored: Stored | None, part: Architecture) -> Stored | None:
    if stored is None:
        return None
    return Stored(
        embedding=stored.embedding if part.starts else (),
        layers=stored.layers[part.first_layer : part.first_layer + part.num_hidden_layers],
        norm=stored.norm if part.ends else (),
        head=stored.head if part.has_head else (),
    )
