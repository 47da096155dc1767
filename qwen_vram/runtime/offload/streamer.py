"""Streamed layers: copied from host or disk into a ring of slots on the device.

While one layer computes in its slot, the next layers are copied into the other slots, on a separate stream. A layer is
one piece of memory, so it needs one copy. Nothing is allocated between tokens. The host waits only for the disk, and
for layers that it computes itself (`host_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.arithmetic.timing.bytes_moved import HOST_ROWS
from qwen_vram.errors import NotSupportedError, QwenVramError
from qwen_vram.runtime.offload.blocks import Block, DiskBlock, HostBlock
from qwen_vram.runtime.offload.cpu_compute import HostLayer
from qwen_vram.runtime.offload.disk_reader import Buffer, DiskReader
from qwen_vram.runtime.offload.slot import Slot
from qwen_vram.runtime.scheduling.turns import CLOSED
from qwen_vram.runtime.tensors.packed_layout import HostMemory


class Streamer:
    """Copier of blocks: each block is in a slot before its layer runs, and the next blocks follow meanwhile.

    Blocks in `hosts` compute on the CPU in steps of few rows. They are copied into slots for many rows, or after they
    get an adapter. Blocks are used in a circle, in the order of the layers. Another order works too, but is slower.

    Several threads may run the model: a lock lets one of them run a layer at a time. Between its runs, a layer's
    parameters show the present contents of its last slot, except in `state_dict()`, which reads the host. Writes into
    parameters, such as merging an adapter, are lost. Streamed layers compute no gradients.
    """

    def __init__(self, blocks: Sequence[Block], memory: HostMemory, slots: int, disk_buffers: int = 0) -> None:
        self.blocks = list(blocks)
        self.device = memory.device
        self._memory = memory
        self.stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # segments reserved while packing do not fit slots
        largest = max(block.nbytes for block in blocks)
        self.slots = [
            Slot(index, torch.empty(largest, dtype=torch.uint8, device=self.device)) for index in range(slots)
        ]
        self._hooks: list[Any] = []
        self._one_at_a_time = RLock()
        for slot in self.slots:
            if self.stream is not None:
                # The last copy may still run when a model is dropped: its slot must not be reused before.
                slot.memory.record_stream(self.stream)
        on_disk = [block for block in self.blocks if isinstance(block, DiskBlock)]
        self._reader = self._read(on_disk, disk_buffers) if on_disk else None
        self.hosts = {
            number: HostLayer(block, self.device)
            for number, block in enumerate(self.blocks)
            if isinstance(block, HostBlock) and block.computes
        }
        self._few = False
        self._numbers = {block.layer: number for number, block in enumerate(self.blocks)}
        self._orders = self._all_orders()
        for number, block in enumerate(self.blocks):
            block.prepare([slot.memory for slot in self.slots])
            self._attach(number, block)
        for block, slot in zip(self.blocks, self.slots, strict=False):
            if self._is_ready(block):
                self._fetch(block, slot)

    def _read(self, on_disk: Sequence[DiskBlock], buffers: int) -> DiskReader:
        """Start reading the first disk layers."""
        largest = max(block.nbytes for block in on_disk)
        event: Any = torch.cuda.Event
        ring = [
            Buffer(self._memory.take(largest), None if self.stream is None else event(blocking=True))
            for _ in range(buffers)
        ]
        return DiskReader([block.image for block in on_disk], ring)

    def close(self) -> None:
        """Free the slots and the host memory; the layers cannot run any more."""
        with self._one_at_a_time:  # a thread may run the model without a turn
            if self.stream is not None:
                self.stream.synchronize()
            if self._reader is not None:
                self._reader.close()
            for block in self.blocks:
                block.drop()
            for hook in self._hooks:
                hook.remove()
            for host in self.hosts.values():
                host.remove()
            for block in self.blocks:
                block.layer.forward = _refuse
            self.blocks, self.slots, self._hooks, self.hosts, self._orders, self._numbers = [], [], [], {}, {}, {}
            self._memory.give_back()

    def _attach(self, number: int, block: Block) -> None:
        resting = number % len(self.slots)
        block.bind(resting)
        block.layer.forward = partial(self.run, block.layer, block.layer.forward)
        for index, module in enumerate(block.modules):  # each may be read on its own
            self._hooks += [
                module.register_state_dict_pre_hook(lambda *_, index=index: block.bind_host(index)),  # type: ignore[no-untyped-call]
                module.register_state_dict_post_hook(lambda *_: block.bind(resting)),  # type: ignore[no-untyped-call]
            ]

    def streams(self, layer: nn.Module) -> bool:
        """Tell if `layer` is one of the streamed layers."""
        return layer in self._numbers

    def run(self, layer: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Return `forward(*inputs, **options)`, computed while the weights of `layer` are in a slot.

        No other thread changes a slot meanwhile. The first input is the hidden states.
        """
        with self._one_at_a_time:
            if not self.blocks:
                _refuse()
            number = self._numbers[layer]
            return self._after(number, forward(*self._before(number, layer, inputs), **options))

    def _before(self, number: int, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Have the layer's block in a slot and bind it after its copy, or let the layer compute on the CPU."""
        if torch.is_grad_enabled():
            _check_no_gradient(layer, inputs)
        block, host = self.blocks[number], self.hosts.get(number)
        self._few = bool(inputs) and inputs[0].shape[:-1].numel() <= HOST_ROWS
        if host is not None and self._few and host.is_whole():
            return host.enter(inputs)
        if host is not None:
            host.active = False  # after an interrupted step
            if self._few:  # and with an adapter that was added since
                self.hosts.pop(number).remove()
                self._orders = self._all_orders()
        slot = self._holding(block)
        if slot is None:
            slot = self._fetch(block, self._idle(self._following(number)))
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            if slot.computes_on != current:  # another thread's stream; the next copy waits only for the newest one
                slot.computed.record(slot.computes_on)
                slot.computed.wait(current)
            slot.computes_on = current
            slot.filled.wait(current)
        block.bind(slot.index)
        return inputs

    def _after(self, number: int, output: Any) -> Any:
        """Start copies of the next blocks into slots that hold none of them, until a block is still on the disk."""
        following = self._following(number)
        for block in following:
            if self._holding(block) is None:
                if not self._is_ready(block):
                    break
                self._fetch(block, self._idle(following))
        host = self.hosts.get(number)
        return host.leave(output) if host is not None and host.active else output

    def _following(self, number: int) -> list[Block]:
        """Return the blocks that fill the slots after block `number`."""
        return self._orders[self._few][number]

    def _all_orders(self) -> dict[bool, list[list[Block]]]:
        """Return the blocks that follow each block, in steps of few rows and of many."""
        return {few: [self._order(number, few=few) for number in range(len(self.blocks))] for few in (False, True)}

    def _order(self, number: int, *, few: bool) -> list[Block]:
        order = [(number + step) % len(self.blocks) for step in range(1, len(self.blocks) + 1)]
        streaming = [index for index in order if not (few and index in self.hosts)]
        return [self.blocks[index] for index in streaming[: len(self.slots)]]

    def _holding(self, block: Block) -> Slot | None:
        return next((slot for slot in self.slots if slot.block is block), None)

    def _idle(self, wanted: Sequence[Block]) -> Slot:
        """Return the slot whose block is not needed next, or is needed last."""
        return max(self.slots, key=lambda slot: wanted.index(slot.block) if slot.block in wanted else len(wanted))

    def _is_ready(self, block: Block) -> bool:
        """Tell if a block can be copied without waiting for the disk."""
        return not isinstance(block, DiskBlock) or self._reader is None or self._reader.is_ready(block.nth)

    def _fetch(self, block: Block, slot: Slot) -> Slot:
        """Start copying a block into a slot, after the work in the slot, and after the block is read from the disk."""
        slot.block = None  # in case this is interrupted
        if isinstance(block, HostBlock):
            self._copy(block.blob, slot)
        elif isinstance(block, DiskBlock) and self._reader is not None:
            buffer = self._reader.take(block.nth)
            self._copy(buffer.memory[: block.nbytes], slot)
            if self.stream is not None:
                buffer.copied.record(self.stream)
            self._reader.passed(block.nth)
        slot.block = block
        return slot

    def _copy(self, source: Tensor, slot: Slot) -> None:
        target = slot.memory[: source.nbytes]
        if self.stream is None:
            target.copy_(source)
            return
        slot.computed.record(slot.computes_on)
        self.stream.wait_event(slot.computed)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            slot.filled.record(self.stream)


def _check_no_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    if any(tensor.requires_grad for tensor in (*tensors, *layer.parameters())):
        raise NotSupportedError(
            "a streamed layer computes no gradients, for its weights are gone from the device by then; run it under "
            "torch.no_grad(), or load with streamed_layers=0 to train",
            knob="streamed_layers",
            value=None,
        )


def _refuse(*_: Any, **__: Any) -> None:
    raise QwenVramError(CLOSED)
