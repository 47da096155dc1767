"""The reader of checkpoint folders: config.json, weights, names and shapes, read once.

Estimates, plans, loading, streaming, merging and saving read a folder only through it, so all agree about the folder.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from qwen_vram.arithmetic.weights import SMALLEST_READ
from qwen_vram.checkpoints.files.local import has_weights, read_config, read_generation, read_tensors
from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.files.state import State, settled_state
from qwen_vram.checkpoints.prequantized import checkpoint_architecture, needs_headers
from qwen_vram.checkpoints.tensors.check import check_tensors
from qwen_vram.checkpoints.tensors.names import HEAD, TABLE, by_model_name
from qwen_vram.checkpoints.tensors.quantized_names import head_is_quantized
from qwen_vram.errors import CheckpointError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.families import open_config

_LAYERS = "model.layers."


class CheckpointFiles(NamedTuple):
    """The contents of a folder.

    Attributes:
        config: The object of config.json, with the `tie_word_embeddings` that `transformers` finally uses.
        generation: The object of generation_config.json; empty if the file does not exist.
        tensors: Every tensor, by the model's names; empty if the folder has no weights.
        notes: Texts that loading logs as warnings.
        of_layers: The number in the folder of each layer; empty if the layers are those of the folder.
    """

    folder: Path
    config: Mapping[str, object]
    generation: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    notes: tuple[str, ...] = ()
    of_layers: tuple[int, ...] = ()

    def with_layers(self, order: tuple[int, ...]) -> "CheckpointFiles":
        """Return the files of a model with the layers of these numbers, each with separate tensors."""
        by_layer: dict[int, dict[str, Tensor]] = {}
        tensors = {}
        for name, tensor in self.tensors.items():
            if name.startswith(_LAYERS):
                layer, _, rest = name.removeprefix(_LAYERS).partition(".")
                by_layer.setdefault(int(layer), {})[rest] = tensor
            else:
                tensors[name] = tensor
        for place, number in enumerate(order):
            tensors |= {f"{_LAYERS}{place}.{rest}": tensor for rest, tensor in by_layer[number].items()}
        config = {**self.config, "num_hidden_layers": len(order)}
        kinds = config.get("layer_types")
        if isinstance(kinds, list):
            config["layer_types"] = [kinds[number] for number in order]
        architecture = replace(self.architecture, layers=tuple(self.architecture.layers[number] for number in order))
        return self._replace(config=config, tensors=tensors, architecture=architecture, of_layers=order)

    @property
    def renamed(self) -> bool:
        """True if a tensor has another name in its file than in the model."""
        return any(name != tensor.name for name, tensor in self.tensors.items())


def read_checkpoint(folder: Path, *, weights: bool) -> "CheckpointFiles":
    """Return the checkpoint in `folder`, with its tensors checked against its config.json.

    It is read again only if an entry of the folder differs from the last call, or changed just before it.

    Args:
        weights: Require weights; otherwise a folder with only config.json is accepted.

    Raises:
        ConfigError: config.json, or generation_config.json, is missing, broken or of another architecture.
        CheckpointError: the weights are missing, broken, or not those of the model that config.json describes.
    """
    state = settled_state(folder)
    return _read(folder, weights) if state is None else _read_once(folder, weights, state)


# Folders that stay in memory, enough for a comparison of models; the largest takes some MB.
@lru_cache(maxsize=8)
def _read_once(folder: Path, weights: bool, state: State) -> "CheckpointFiles":
    """Return the result of `_read` for a folder in `state`, cached."""
    return _read(folder, weights)


def _read(folder: Path, weights: bool) -> "CheckpointFiles":
    config = read_config(folder)
    generation = read_generation(folder)
    source = str(folder / CONFIG)
    if not (weights or has_weights(folder, config)):
        read = (lambda: read_tensors(folder, config)) if needs_headers(config) else None
        architecture = checkpoint_architecture(config, read, source=source)
        return CheckpointFiles(
            folder=folder, config=config, generation=generation, tensors={}, architecture=architecture
        )
    open_config(config, source)  # errors of config.json alone come before those of the weights
    tensors = _named(folder, config)
    config = _settle_head(folder, config, tensors)
    architecture = checkpoint_architecture(config, lambda: tensors, source=source, headers_here=True)
    # The tensors of a quantized checkpoint have just been checked against config.json.
    notes = check_tensors(architecture, tensors, folder) if architecture.stored_format is None else ()
    return CheckpointFiles(
        folder=folder,
        config=config,
        generation=generation,
        tensors=tensors,
        architecture=replace(architecture, layer_dtypes=_layer_dtypes(tensors)),
        notes=notes,
    )


def _named(folder: Path, config: Mapping[str, object]) -> dict[str, Tensor]:
    tensors, twice = by_model_name(read_tensors(folder, config))
    if twice:
        from qwen_vram.checkpoints.files.absent import shown

        raise CheckpointError(
            f"the weights in {str(folder)!r} hold {shown(twice)} twice, with and without 'model.' before the name; "
            "keep one of the two",
            path=str(folder),
        )
    return tensors


def _settle_head(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> dict[str, object]:
    """Return config.json as `transformers` treats tied embeddings: not tied if the files hold a head that differs."""
    head, table = tensors.get(HEAD), tensors.get(TABLE)
    if config.get("tie_word_embeddings") is not True or head is None or head_is_quantized(tensors):
        return config
    if table is None:
        tensors[TABLE] = tensors.pop(HEAD)
        return config
    if (head.dtype, head.shape) != (table.dtype, table.shape):
        raise CheckpointError(
            f"config.json says tie_word_embeddings true, and {str(folder)!r} holds {HEAD} as {head.dtype} "
            f"{list(head.shape)} beside {TABLE} as {table.dtype} {list(table.shape)}; set tie_word_embeddings to "
            "false if the head is the model's own, or take it out of the file",
            path=str(folder / head.file),
        )
    from qwen_vram.checkpoints.files.same_bytes import same_bytes

    if same_bytes(folder / head.file, head.offset, folder / table.file, table.offset, head.nbytes):
        del tensors[HEAD]
        return config
    return {**config, "tie_word_embeddings": False}


def _layer_dtypes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    large = (one for name, one in tensors.items() if ".layers." in name and one.nbytes >= SMALLEST_READ)
    return tuple(sorted({tensor.dtype for tensor in large}))
