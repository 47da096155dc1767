"""A slot: a device buffer for the weights of one streamed layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_vram.runtime.offload.blocks import Block


class Slot:
    """A buffer on the device for one block, and the block that it holds."""

    def __init__(self, index: int, memory: Tensor) -> None:
        self.index = index
        self.memory = memory
        self.block: Block | None = None
        if memory.is_cuda:
            self.filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.computes_on = torch.cuda.current_stream(memory.device)
