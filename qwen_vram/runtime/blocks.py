"""Blocks: decoder layers on the host, each in one piece; read and quantized one tensor at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qwen_vram.files.local import read_tensors
from qwen_vram.runtime.backends.base import Request, StreamingBackend
from qwen_vram.runtime.blob import HostMemory, Layout

# Makes a module use prepared tensors: assignments alone.
Binding = Callable[[], None]


class Block:
    """One decoder layer on the host.

    Attributes:
        layer: The layer; its parameters and quantization state are views, into a slot or into `blob`.
        modules: Its modules with tensors of their own.
        blob: All of its tensors as bytes.
    """

    def __init__(
        self, layer: nn.Module, modules: Sequence[nn.Module], backend: StreamingBackend, memory: HostMemory
    ) -> None:
        self.layer = layer
        self.modules, self._backend = modules, backend
        tensors = {
            (index, name): one for index, module in enumerate(modules) for name, one in backend.tensors(module).items()
        }
        self._layout = Layout(tensors)
        self.blob = memory.take(self._layout.nbytes)
        views = self._layout.views(self.blob)
        for key, view in views.items():
            view.copy_(tensors[key])
        self._on_host = self._bindings(views)
        self._empty = self._bindings({key: view.new_empty(0) for key, view in views.items()})
        self._in_slots: list[list[Binding]] = []
        self.bind_host()

    def prepare(self, slots: Sequence[Tensor]) -> None:
        """Make the views into each slot's memory, once for all steps to come."""
        self._in_slots = [self._bindings(self._layout.views(memory)) for memory in slots]

    def bind(self, slot: int) -> None:
        """Let the layer use what lies in a slot."""
        for bind in self._in_slots[slot]:
            bind()

    def bind_host(self) -> None:
        """Let the layer use what lies on the host."""
        for bind in self._on_host:
            bind()

    def drop(self) -> None:
        """Let go of all memory: the layer's tensors are left empty."""
        for bind in self._empty:
            bind()
        self._on_host, self._in_slots = [], []
        self.blob = self.blob.new_empty(0)

    def _bindings(self, views: Mapping[tuple[int, str], Tensor]) -> list[Binding]:
        by_module: list[dict[str, Tensor]] = [{} for _ in self.modules]
        for (index, name), view in views.items():
            by_module[index][name] = view
        return [self._backend.binding(module, own) for module, own in zip(self.modules, by_module, strict=True)]


def pack_layers(
    model: Any,
    numbers: Collection[int],
    backend: StreamingBackend,
    request: Request,
    memory: HostMemory,
    progress: Callable[..., Iterable[int]],
) -> list[Block]:
    """Build the decoder layers with these numbers, which stand on the meta device, and leave them in host memory.

    A quantized head that stands there too is built first, to stay on the device. The device holds one matrix and a tile
    at a time beside what it held before, and nothing more where matrices are stored quantized; the host, one layer in
    the request's format beside the blocks.

    Args:
        progress: Wraps the numbers in a progress bar, as `tqdm` does.
    """
    model.requires_grad_(False)
    model.generation_config.disable_compile = True  # a compiled step would keep the first addresses of all weights
    blocks = []
    with ExitStack() as files:
        read = _reader(Path(request.folder), files)
        if request.late_head:
            _build(model, "lm_head", "model.embed_tokens" if _untie(model) else "lm_head", read, backend, request)
        for number in progress(sorted(numbers), desc="Packing streamed layers"):
            layer = model.model.layers[number]
            modules = []
            for name, module in list(layer.named_modules()):
                if next(module.parameters(recurse=False), None) is not None:
                    made = _build(layer, name, f"model.layers.{number}.{name}", read, backend, request)
                    backend.binding(made, {key: one.to("cpu") for key, one in backend.tensors(made).items()})()
                    modules.append(made)
            blocks.append(Block(layer, modules, backend, memory))
    return blocks


def _untie(model: Any) -> bool:
    """Whether the head was the token table; from here on it is not."""
    tied: bool = model.config.tie_word_embeddings
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return tied


def _build(
    parent: nn.Module,
    name: str,
    full_name: str,
    read: Callable[[str], dict[str, Tensor]],
    backend: StreamingBackend,
    request: Request,
) -> nn.Module:
    """Put the module called `name` into `parent` with its weights; what is quantized now is on the device."""
    module = parent.get_submodule(name)
    weights = read(full_name)
    if not request.stored:
        weights = {parameter: weights[parameter] for parameter, _ in module.named_parameters(recurse=False)}
    made = backend.build(module, weights, request)
    parent.set_submodule(name, made)
    return made


def _reader(folder: Path, files: ExitStack) -> Callable[[str], dict[str, Tensor]]:
    """A call that gives a module's tensors of the checkpoint, by their names in it, mapped from disk.

    `files` keeps files open.
    """
    from safetensors import safe_open

    places = read_tensors(folder)
    names = sorted(places)
    opened: dict[str, Any] = {}

    def tensor(name: str) -> Tensor:
        file = places[name].file
        if file not in opened:
            opened[file] = files.enter_context(safe_open(folder / file, framework="pt"))
        found: Tensor = opened[file].get_tensor(name)
        return found

    def read(module: str) -> dict[str, Tensor]:
        prefix = f"{module}."
        own = takewhile(lambda name: name.startswith(prefix), names[bisect_left(names, prefix) :])
        return {name.removeprefix(prefix): tensor(name) for name in own}

    return read
