"""Table of dtypes, joined with torch's own, and torch's default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_vram.dtypes import BY_NAME, DTYPES, Dtype

# torch's dtype by its name in safetensors files.
TORCH_DTYPES: dict[str, torch.dtype] = {
    row.stored: getattr(torch, row.torch) for row in DTYPES if hasattr(torch, row.torch)
}
# The table's row of each of torch's dtypes that safetensors stores.
ROWS: dict[torch.dtype, Dtype] = {TORCH_DTYPES[row.stored]: row for row in DTYPES if row.stored in TORCH_DTYPES}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a model's dtype `name`, such as `"bf16"`."""
    return TORCH_DTYPES[BY_NAME[name].stored]


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 torch's default dtype for a while, and then restore the caller's.

    bitsandbytes and torch make tables and scales in the default dtype, and kernels read them as float32.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
