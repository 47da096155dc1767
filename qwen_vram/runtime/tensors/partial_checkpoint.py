"""`from_pretrained` of other tensors than a checkpoint holds: one more that is quantized as it comes, or some fewer.

Nothing is read before its turn, and nothing twice at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.checkpoints.files.names import GENERATION
from qwen_vram.checkpoints.tensors.names import HEAD, TABLE
from qwen_vram.runtime.tensors.mapped_checkpoint import open_weights
from qwen_vram.runtime.torch_dtypes import ROWS


def load_with_own_head(files: CheckpointFiles, *, mapped: bool, config: Any, **options: Any) -> nn.Module:
    """The model of a checkpoint as if the head were stored beside the table: a head of its own for tied embeddings.

    A head that the file holds all the same is taken, as `transformers` does where the two differ.
    """
    config.tie_word_embeddings = False
    with _slices(files, mapped) as tensors:
        tensors.setdefault(HEAD, tensors[TABLE])
        return _from_tensors(files.folder, tensors, config=config, **options)


def load_without(
    files: CheckpointFiles,
    parameters: Mapping[str, tuple[int, ...]],
    *,
    mapped: bool,
    made: Mapping[str, torch.Tensor],
    narrowed: Collection[str],
    **options: Any,
) -> nn.Module:
    """The model of a checkpoint whose modules with these parameters, which go to "meta" by the device map, stay empty.

    A parameter that is not there at all would be made up, in its full size. So each comes without its data.

    Args:
        parameters: All parameters of those modules by name, with their shapes in the model.
        mapped: Whether the files are mapped; otherwise each tensor is read when it is wanted.
        made: Tensors that the files lack.
        narrowed: Names of tensors that are cast to the model's dtype as they are read.
        **options: With `config`.
    """
    modules = tuple({f"{name.rpartition('.')[0]}." for name in parameters})
    with _slices(files, mapped) as tensors:
        shown = {
            name: _Narrowed(tensor, options["dtype"]) if name in narrowed else tensor
            for name, tensor in tensors.items()
            if not name.startswith(modules)
        }
        shown |= {name: torch.empty(shape, device="meta") for name, shape in parameters.items()} | dict(made)
        return _from_tensors(files.folder, shown, **options)


class _Copied:
    """A tensor of a file that is copied when it is sliced. It stands where safetensors' slice would."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._tensor[index]
        return part.clone()

    def get_shape(self) -> list[int]:
        """Its shape."""
        shape: list[int] = self._tensor.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Its dtype, as safetensors spells it."""
        dtype: str = self._tensor.get_dtype()
        return dtype


class _Narrowed(_Copied):
    """The same for one that is cast."""

    def __init__(self, tensor: Any, dtype: torch.dtype) -> None:
        super().__init__(tensor)
        self._dtype = dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._tensor[index]
        return part.to(self._dtype)

    def get_dtype(self) -> str:
        """The dtype that it is cast to, as safetensors spells it."""
        return ROWS[self._dtype].stored


@contextmanager
def _slices(files: CheckpointFiles, mapped: bool) -> Iterator[dict[str, Any]]:
    """Every tensor of a checkpoint by the model's name, to be read when it is sliced.

    One that the model has twice is copied the second time, or both would be the same mapped memory on the CPU.
    """
    with ExitStack() as stack:
        names = {tensor.file for tensor in files.tensors.values()}
        opened = {name: stack.enter_context(open_weights(files.folder / name, mapped=mapped)) for name in names}
        shown: dict[str, Any] = {}
        seen: set[str] = set()
        for name, tensor in files.tensors.items():
            part = opened[tensor.file].get_slice(tensor.name)
            shown[name] = _Copied(part) if tensor.name in seen else part
            seen.add(tensor.name)
        yield shown


def _from_tensors(folder: Path, tensors: Mapping[str, Any], *, config: Any, **options: Any) -> nn.Module:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: Any = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    # What else from_pretrained takes from a folder.
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    loaded: nn.Module = model
    return loaded
