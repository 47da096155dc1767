"""`from_pretrained` with more or fewer tensors than the checkpoint holds.

A tensor is read only when it is needed, and is not in memory twice.
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
    """Return the model of a checkpoint with tied embeddings, with a separate head, as if the head were stored.

    A head in the file is used, as in `transformers` if the two tables differ.
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
    """Return the model of a checkpoint in which the modules of these parameters stay empty, on "meta".

    `transformers` would initialize a missing parameter in its full size, so each is passed without its data.

    Args:
        parameters: All parameters of those modules by name, with their shapes in the model.
        mapped: Map the files; otherwise each tensor is read when it is used.
        made: Tensors that the files lack.
        narrowed: Names of tensors that are cast to the model's dtype as they are read.
        **options: Options of `from_pretrained`, with `config`.
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
    """A tensor of a file that is copied when it is sliced, in place of safetensors' slice."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._tensor[index]
        return part.clone()

    def get_shape(self) -> list[int]:
        """Return the shape."""
        shape: list[int] = self._tensor.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return the dtype, as safetensors spells it."""
        dtype: str = self._tensor.get_dtype()
        return dtype


class _Narrowed(_Copied):
    """A tensor of a file that is cast when it is sliced."""

    def __init__(self, tensor: Any, dtype: torch.dtype) -> None:
        super().__init__(tensor)
        self._dtype = dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._tensor[index]
        return part.to(self._dtype)

    def get_dtype(self) -> str:
        """Return the dtype of the result, as safetensors spells it."""
        return ROWS[self._dtype].stored


@contextmanager
def _slices(files: CheckpointFiles, mapped: bool) -> Iterator[dict[str, Any]]:
    """Give every tensor of a checkpoint by the model's name, to be read when it is sliced.

    A tensor that the model has twice is copied the second time. Otherwise both would be the same mapped memory on the
    CPU.
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
    # Further attributes that from_pretrained sets from a folder.
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    loaded: nn.Module = model
    return loaded
