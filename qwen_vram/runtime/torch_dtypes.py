"""The dtypes of the table as torch has them."""

from __future__ import annotations

import torch

from qwen_vram.dtypes import BY_NAME, DTYPES, Dtype

# torch's dtype by its name in safetensors files.
TORCH_DTYPES: dict[str, torch.dtype] = {
    row.stored: getattr(torch, row.torch) for row in DTYPES if hasattr(torch, row.torch)
}
# The table's row of each of torch's dtypes that safetensors stores.
ROWS: dict[torch.dtype, Dtype] = {TORCH_DTYPES[row.stored]: row for row in DTYPES if row.stored in TORCH_DTYPES}


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a model that runs in `name`, such as `"bf16"`."""
    return TORCH_DTYPES[BY_NAME[name].stored]
