"""Cards by name, and the machine that stands for a card which is not here."""

from __future__ import annotations

from qwen_vram.errors import UnknownNameError
from qwen_vram.spec.cards.rows import GPUS, Gpu
from qwen_vram.spec.machine import DEFAULT, DEVICE_BANDWIDTH, MATMUL_RATE, Machine

# Other names that people use.
_ALIASES = {"h100": "H100-SXM", "h100-80gb": "H100-SXM", "a100": "A100-80GB", "rtx pro 6000 blackwell": "RTX PRO 6000"}
# The rates of the H200 that this library's times were measured on, as shares of its datasheet.
_BANDWIDTH_SHARE = DEVICE_BANDWIDTH / GPUS["H200"].bandwidth
_MATMUL_SHARE = MATMUL_RATE / GPUS["H200"].flops


def find_gpu(name: str) -> Gpu:
    """Return the card called `name`, in any case, with or without spaces, hyphens and `RTX`.

    Raises:
        UnknownNameError: no card has this name; it lists the names.

    Example:
        >>> find_gpu("rtx4090").name, find_gpu("a100-80gb").memory
        ('RTX 4090', 84987084800)
    """
    if isinstance(name, str):
        wanted = _plain(_ALIASES.get(name.lower(), name))
        for row in GPUS.values():
            if wanted == _plain(row.name):
                return row
    raise UnknownNameError("GPU", name, tuple(GPUS))


def _plain(name: str) -> str:
    plain = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    return plain.removeprefix("nvidia").removeprefix("geforce").removeprefix("rtx")


def machine_of(gpu: Gpu, *, fp8: bool = False) -> Machine:
    """Return the machine with this card: rates in the shares of the datasheet that were measured on an H200.

    Args:
        fp8: Products are in 8-bit floating point.
    """
    flops = gpu.fp8_flops if fp8 and gpu.fp8_flops else gpu.flops
    return DEFAULT._replace(
        device=f"NVIDIA {gpu.name}",
        device_bandwidth=round(_BANDWIDTH_SHARE * gpu.bandwidth),
        matmul_rate=round(_MATMUL_SHARE * flops),
        pinned_copy_rate=round(DEFAULT.pinned_copy_rate / GPUS["H200"].pcie_rate * gpu.pcie_rate),
    )
