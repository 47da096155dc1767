"""A slot: room on the device through which streamed layers pass, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_vram.runtime.offload.blocks import Block


class Slot:
    """Room on the device for one block, and which block it holds."""

    def __init__(self, index: int, memory: Tensor) -> None:
        self.index = index
        self.memory = memory
        self.block: Block | None = None
        if memory.is_cuda:
            self.filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.computes_on = torch.cuda.current_stream(memory.device)
