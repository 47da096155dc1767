"""Blocks: decoder layers on the host or on the disk, each in one piece; built and quantized one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.arithmetic.weights import SMALLEST_READ
from qwen_vram.errors import NotSupportedError
from qwen_vram.runtime.backends.base import Request, StreamingBackend
from qwen_vram.runtime.blob import HostMemory, Layout
from qwen_vram.runtime.disk import Image, Piece
from qwen_vram.runtime.mapped import MappedCheckpoint

# Makes a module use prepared tensors: assignments alone.
Binding = Callable[[], None]


class Block:
    """One decoder layer that streams.

    Attributes:
        layer: The layer; its parameters and quantization state are views, into a slot or on the host.
        modules: Its modules with tensors of their own.
        nbytes: All of its tensors together.
    """

    def __init__(self, layer: nn.Module, modules: Sequence[nn.Module], backend: StreamingBackend) -> None:
        self.layer = layer
        self.modules, self._backend = modules, backend
        self._tensors = {
            (index, name): one for index, module in enumerate(modules) for name, one in backend.tensors(module).items()
        }
        self._layout = Layout(self._tensors)
        self.nbytes = self._layout.nbytes
        self._empty = self._bindings({key: one.new_empty(0) for key, one in self._tensors.items()})
        self._in_slots: list[list[Binding]] = []

    def prepare(self, slots: Sequence[Tensor]) -> None:
        """Make the views into each slot's memory, once for all steps to come."""
        self._in_slots = [self._bindings(self._layout.views(memory)) for memory in slots]

    def bind(self, slot: int) -> None:
        """Let the layer use what lies in a slot."""
        for bind in self._in_slots[slot]:
            bind()

    def bind_host(self, index: int) -> None:
        """Let one of its modules use tensors on the host."""
        raise NotImplementedError

    def drop(self) -> None:
        """Let go of all memory: the layer's tensors are left empty."""
        for bind in self._empty:
            bind()
        self._in_slots = []

    def _bindings(self, views: Mapping[tuple[int, str], Tensor]) -> list[Binding]:
        return [
            self._backend.binding(module, {name: view for (owner, name), view in views.items() if owner == index})
            for index, module in enumerate(self.modules)
        ]


class HostBlock(Block):
    """One that stays in host memory, in `blob`."""

    def __init__(
        self, layer: nn.Module, modules: Sequence[nn.Module], backend: StreamingBackend, memory: HostMemory
    ) -> None:
        super().__init__(layer, modules, backend)
        self.blob = memory.take(self.nbytes)
        views = self._layout.views(self.blob)
        for key, view in views.items():
            view.copy_(self._tensors[key])
        self._tensors = {}
        self._on_host = self._bindings(views)
        for bind in self._on_host:
            bind()

    def bind_host(self, index: int) -> None:
        """Let one of its modules use what lies in `blob`."""
        self._on_host[index]()

    def drop(self) -> None:
        """Let go of all memory: the layer's tensors are left empty."""
        super().drop()
        self._on_host = []
        self.blob = self.blob.new_empty(0)


class DiskBlock(Block):
    """One that stays in the checkpoint's files, as `image` says; the `nth` of its kind, from 0.

    Raises:
        NotSupportedError: a large tensor is no longer as it is there.
    """

    def __init__(
        self,
        layer: nn.Module,
        modules: Sequence[nn.Module],
        backend: StreamingBackend,
        mapped: MappedCheckpoint,
        nth: int,
    ) -> None:
        super().__init__(layer, modules, backend)
        self.nth = nth
        self._parts = {key: _part(tensor, mapped) for key, tensor in self._tensors.items()}
        self._tensors = {}
        self.image = Image({self._layout.places[key].offset: part for key, part in self._parts.items()})
        for bind in self._empty:
            bind()  # or the layer would keep the files mapped

    def bind_host(self, index: int) -> None:
        """Let one of its modules use its tensors, read now into memory of their own."""
        self.bind(0)  # for its quantization state is as it was stored
        tensors = {}
        for (owner, name), part in self._parts.items():
            if owner == index:
                _, dtype, shape = self._layout.places[owner, name]
                tensors[name] = torch.empty(shape, dtype=dtype)
                Image({0: part}).read_into(tensors[name].view(-1).view(torch.uint8).numpy().data)
        self._backend.binding(self.modules[index], tensors)()


def _part(tensor: Tensor, mapped: MappedCheckpoint) -> Piece | bytes:
    """Where a tensor lies in the files, or its bytes where they are few."""
    if tensor.nbytes < SMALLEST_READ:
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    piece = mapped.piece(tensor)
    if piece is None:
        raise NotSupportedError(
            f"disk_layers: a tensor of {tensor.nbytes:,} bytes is in the checkpoint's files in another form than it "
            "runs in; use disk_layers=0",
            knob="disk_layers",
            value=None,
        )
    return piece


def pack_layers(
    model: Any,
    numbers: Collection[int],
    on_disk: Collection[int],
    backend: StreamingBackend,
    request: Request,
    memory: HostMemory,
    progress: Callable[..., Iterable[int]],
) -> list[Block]:
    """Build the decoder layers with these numbers, which stand on the meta device, and leave them where they belong.

    A quantized head that stands there too is built first, to stay on the device. The device holds one matrix and a tile
    at a time beside what it held before, and nothing more where matrices are stored quantized; the host, one layer in
    the request's format beside the blocks. Of disk layers hardly anything is read.

    Args:
        on_disk: Those among them that stay in the checkpoint's files.
        progress: Wraps the numbers in a progress bar, as `tqdm` does.
    """
    model.requires_grad_(False)
    model.generation_config.disable_compile = True  # a compiled step would keep the first addresses of all weights
    blocks: list[Block] = []
    with ExitStack() as files:
        mapped = MappedCheckpoint(Path(request.folder), files)
        if request.late_head:
            _build(model, "lm_head", "model.embed_tokens" if _untie(model) else "lm_head", mapped, backend, request)
        for number in progress(sorted(numbers), desc="Packing streamed layers"):
            layer = model.model.layers[number]
            modules = []
            for name, module in list(layer.named_modules()):
                if next(module.parameters(recurse=False), None) is not None:
                    made = _build(layer, name, f"model.layers.{number}.{name}", mapped, backend, request)
                    backend.binding(made, {key: one.to("cpu") for key, one in backend.tensors(made).items()})()
                    modules.append(made)
            if number in on_disk:
                nth = sum(isinstance(block, DiskBlock) for block in blocks)
                blocks.append(DiskBlock(layer, modules, backend, mapped, nth))
            else:
                blocks.append(HostBlock(layer, modules, backend, memory))
            mapped.forget()
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
    mapped: MappedCheckpoint,
    backend: StreamingBackend,
    request: Request,
) -> nn.Module:
    """Put the module called `name` into `parent` with its weights; what is quantized now is on the device."""
    module = parent.get_submodule(name)
    weights = mapped.tensors(full_name)
    if not request.stored:
        weights = {parameter: weights[parameter] for parameter, _ in module.named_parameters(recurse=False)}
    made = backend.build(module, weights, request)
    parent.set_submodule(name, made)
    return made
