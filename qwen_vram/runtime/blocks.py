"""Streamed layers as they are loaded: read and quantized one tensor at a time, packed one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.files.local import read_tensors
from qwen_vram.runtime.backends.base import Request, StreamingBackend
from qwen_vram.runtime.blob import HostMemory
from qwen_vram.runtime.streaming import Block, Streamer


def stream_layers(
    model: Any,
    layers: Collection[int],
    backend: StreamingBackend,
    request: Request,
    progress: Callable[..., Iterable[int]],
) -> Streamer:
    """Build the decoder layers numbered `layers`, which stand on the meta device, and let them stream.

    The device holds one matrix at a time beside what it held before, then the slots. The host holds what is packed
    already, and one layer in the request's format beside it.

    Args:
        progress: Wraps the numbers in a progress bar, as `tqdm` does.
    """
    model.requires_grad_(False)
    model.generation_config.disable_compile = True  # a compiled step would keep the first addresses of all weights
    memory = HostMemory(request.device)
    blocks = []
    with ExitStack() as files:
        read = _reader(Path(request.folder), files)
        for number in progress(sorted(layers), desc="Packing streamed layers"):
            layer = model.model.layers[number]
            modules = [
                _build(layer, name, f"model.layers.{number}.{name}", read, backend, request)
                for name, module in list(layer.named_modules())
                if next(module.parameters(recurse=False), None) is not None
            ]
            blocks.append(Block(layer, modules, backend, memory))
    if request.device.type == "cuda":
        torch.cuda.empty_cache()  # what was reserved for one matrix at a time does not fit slots
    return Streamer(blocks, memory)


def _build(
    layer: nn.Module,
    name: str,
    full_name: str,
    read: Callable[[str], Tensor],
    backend: StreamingBackend,
    request: Request,
) -> nn.Module:
    """Put the module called `name` into `layer` with its weights, and bring all that it holds to the host."""
    module = layer.get_submodule(name)
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    weights = {parameter: read(f"{full_name}.{parameter}").to(request.dtype) for parameter in own}
    made = backend.build(module, weights, request)
    layer.set_submodule(name, made)
    backend.binding(made, {key: tensor.to("cpu") for key, tensor in backend.tensors(made).items()})()
    return made


def _reader(folder: Path, files: ExitStack) -> Callable[[str], Tensor]:
    """A call that gives a tensor of the checkpoint by its name, mapped from disk; `files` keeps files open."""
    from safetensors import safe_open

    places = read_tensors(folder)
    opened: dict[str, Any] = {}

    def read(name: str) -> Tensor:
        file = places[name].file
        if file not in opened:
            opened[file] = files.enter_context(safe_open(folder / file, framework="pt"))
        tensor: Tensor = opened[file].get_tensor(name)
        return tensor

    return read
