"""Streamed decoder layers, each one block in host memory or in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qwen_vram.arithmetic.weights import SMALLEST_READ
from qwen_vram.errors import NotSupportedError
from qwen_vram.runtime.backends.base import HostBackend, StreamingBackend
from qwen_vram.runtime.tensors.file_extents import Extent, FileExtents
from qwen_vram.runtime.tensors.mapped_checkpoint import MappedCheckpoint
from qwen_vram.runtime.tensors.packed_layout import HostMemory, Layout

# A call that makes a module use prepared tensors, by assignments only.
Binding = Callable[[], None]


class Block(ABC):
    """One decoder layer that streams.

    Attributes:
        layer: The layer; its parameters and quantization state are views, into a slot or on the host.
        modules: Its modules with tensors of their own.
        nbytes: Bytes of all its tensors.
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
        """Create the views into each slot's memory, once for all later steps."""
        self._in_slots = [self._bindings(self._layout.views(memory)) for memory in slots]

    def bind(self, slot: int) -> None:
        """Make the layer use the contents of a slot."""
        for bind in self._in_slots[slot]:
            bind()

    @abstractmethod
    def bind_host(self, index: int) -> None:
        """Make one of its modules use tensors on the host."""

    def drop(self) -> None:
        """Release all memory: the layer's tensors become empty."""
        for bind in self._empty:
            bind()
        self._in_slots = []

    def _bindings(self, views: Mapping[tuple[int, str], Tensor]) -> list[Binding]:
        return [
            self._backend.binding(module, {name: view for (owner, name), view in views.items() if owner == index})
            for index, module in enumerate(self.modules)
        ]


class HostBlock(Block):
    """A block that stays in host memory, in `blob`; it `computes` if it can also run on the CPU."""

    def __init__(
        self, layer: nn.Module, modules: Sequence[nn.Module], backend: StreamingBackend, memory: HostMemory
    ) -> None:
        super().__init__(layer, modules, backend)
        self.blob = memory.take(self.nbytes)
        views = self._layout.views(self.blob)
        for key, view in views.items():
            view.copy_(self._tensors[key])
        self._tensors = {}
        self._views = views
        self._on_host = self._bindings(views)
        self._computing: list[Binding] = []
        for bind in self._on_host:
            bind()

    @property
    def computes(self) -> bool:
        """True if `compute_on` was called."""
        return bool(self._computing)

    def compute_on(self, backend: HostBackend) -> None:
        """Prepare the modules to compute on the CPU, for `bind_computing`."""
        self._computing = [
            backend.host_binding(module, {name: view for (owner, name), view in self._views.items() if owner == index})
            for index, module in enumerate(self.modules)
        ]

    def bind_computing(self) -> None:
        """Make the layer compute on the CPU, until `stop_computing`, or until it is bound to a slot."""
        for bind in self._computing:
            bind()

    def bind(self, slot: int) -> None:
        """Make the layer use the contents of a slot."""
        self.stop_computing()
        super().bind(slot)

    def bind_host(self, index: int) -> None:
        """Make one of its modules use its tensors in `blob`."""
        self._on_host[index]()

    def stop_computing(self) -> None:
        """Undo `bind_computing`."""
        for module in self.modules if self._computing else ():
            module.__dict__.pop("forward", None)

    def drop(self) -> None:
        """Release all memory: the layer's tensors become empty."""
        self.stop_computing()
        super().drop()
        self._on_host, self._computing, self._views = [], [], {}
        self.blob = self.blob.new_empty(0)


class DiskBlock(Block):
    """A block that stays in the checkpoint's files, described by `image`; the `nth` of its kind, from 0.

    Raises:
        NotSupportedError: a large tensor differs from the one in the files.
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
        self.image = FileExtents({self._layout.places[key].offset: part for key, part in self._parts.items()})
        for bind in self._empty:
            bind()  # otherwise the layer would keep the files mapped

    def bind_host(self, index: int) -> None:
        """Make one of its modules use its tensors, read now into new memory."""
        self.bind(0)  # because its quantization state is as stored
        tensors = {}
        for (owner, name), part in self._parts.items():
            if owner == index:
                _, dtype, shape = self._layout.places[owner, name]
                tensors[name] = torch.empty(shape, dtype=dtype)
                FileExtents({0: part}).read_into(tensors[name].view(-1).view(torch.uint8).numpy().data)
        self._backend.binding(self.modules[index], tensors)()


def _part(tensor: Tensor, mapped: MappedCheckpoint) -> Extent | bytes:
    """Return the position of a tensor in the files, or its bytes if they are few."""
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
