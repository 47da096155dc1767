"""Table of NVIDIA's cards: memory, rates and links.

A row has the figures of the datasheet: decimal units, dense products, and products of 16 bits that add up in float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Link = Literal["NVLink", "PCIe"]
_GB, _TERA, _MIB = 10**9, 10**12, 2**20

# One direction of a PCIe slot. Source: PCI-SIG, 16 lanes of 8, 16 and 32 GT/s with 128b/130b coding; a card with 8
# lanes has half of it.
_PCIE3, _PCIE4, _PCIE5 = 15_750_000_000, 31_500_000_000, 63_000_000_000
# The share of a GDDR card's memory that CUDA shows. With ECC in the same memory a T4 shows 14.74 of 16 GiB, without
# it a GeForce 3090 shows 23.58 of 24 GiB and a 5060 Ti 15.45 of 16. The smallest of each kind is used for all of it.
# Source: https://github.com/vllm-project/vllm/pull/14447 (3090), https://github.com/Luce-Org/lucebox/issues/407
# (5060 Ti), start-up logs of vLLM on a T4.
_ECC_SHARE, _GEFORCE_SHARE = 0.921, 0.965


class Gpu(NamedTuple):
    """A card, by its datasheet.

    Attributes:
        name: The name that callers use.
        memory: Bytes that CUDA shows.
        bandwidth: Bytes a second of its memory.
        flops: Operations a second of dense 16-bit products.
        fp8_flops: The same of dense 8-bit floating-point products; 0 if it has none.
        link: The connection between cards of one machine.
        link_rate: Bytes a second of it in one direction.
        pcie_rate: Bytes a second from the host in one direction.
        capability: CUDA's compute capability.
    """

    name: str
    memory: int
    bandwidth: int
    flops: int
    fp8_flops: int
    link: Link
    link_rate: int
    pcie_rate: int
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """Tell if it multiplies bf16: since Ampere."""
        return self.capability >= (8, 0)


def _card(
    name: str,
    memory: float,
    bandwidth: float,
    tflops: float,
    fp8: float,
    pcie: int,
    capability: tuple[int, int],
    nvlink: float = 0.0,
) -> Gpu:
    """Return a row; `memory` in GiB, `bandwidth` and `nvlink` (both directions, as NVIDIA states it) in GB/s."""
    link: Link = "NVLink" if nvlink else "PCIe"
    link_rate = round(nvlink * _GB / 2) if nvlink else pcie
    memory_bytes = round(memory * 1024) * _MIB
    rates = round(bandwidth * _GB), round(tflops * _TERA), round(fp8 * _TERA)
    return Gpu(name, memory_bytes, *rates, link, link_rate, pcie, capability)


GPUS: dict[str, Gpu] = {
    row.name: row
    for row in (
        # Source of 30xx: https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf;
        # of the 3060: https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/rtx-3060-3060ti/, its products from
        # its 12.74 TFLOP/s in float32, in the ratio of the 3090 (71 to 35.58).
        _card("RTX 3060 12GB", 12 * _GEFORCE_SHARE, 360, 25.4, 0, _PCIE4, (8, 6)),
        _card("RTX 3090", 23.58, 936, 71, 0, _PCIE4, (8, 6)),
        # Source of 40xx: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (4090
        # and 4080), and https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/ (4060 Ti and 4070). The products
        # of these two are from float32 (22.06 and 29.15), in the ratio of the 4090 (165.2 and 330.3 to 82.58).
        _card("RTX 4060 Ti 16GB", 16 * _GEFORCE_SHARE, 288, 44.1, 88.2, _PCIE4 // 2, (8, 9)),
        _card("RTX 4070", 12 * _GEFORCE_SHARE, 504, 58.3, 116.6, _PCIE4, (8, 9)),
        _card("RTX 4080", 16 * _GEFORCE_SHARE, 716.8, 97.5, 194.9, _PCIE4, (8, 9)),
        # 23.55 GiB in vLLM: https://github.com/vllm-project/vllm/issues/13061.
        _card("RTX 4090", 23.55, 1008, 165.2, 330.3, _PCIE4, (8, 9)),
        # Source of 50xx: https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-
        # architecture.pdf.
        _card("RTX 5070 Ti", 16 * _GEFORCE_SHARE, 896, 87.9, 175.8, _PCIE5, (12, 0)),
        _card("RTX 5080", 16 * _GEFORCE_SHARE, 960, 112.6, 225.1, _PCIE5, (12, 0)),
        _card("RTX 5090", 32 * _GEFORCE_SHARE, 1792, 209.5, 419, _PCIE5, (12, 0)),
        # Source: https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/
        # NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf; 95.00 GiB in vLLM's start-up logs.
        _card("RTX PRO 6000", 95, 1792, 503.8, 1007.6, _PCIE5, (12, 0)),
        # Source: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-
        # 951643.pdf.
        _card("T4", 16 * _ECC_SHARE, 320, 65, 0, _PCIE3, (7, 5)),
        # Source: https://www.nvidia.com/en-us/data-center/l4/ (242 and 485 TFLOP/s are with sparsity, twice the dense).
        _card("L4", 24 * _ECC_SHARE, 300, 121, 242.5, _PCIE4, (8, 9)),
        # Source: https://www.nvidia.com/en-us/data-center/l40s/.
        _card("L40S", 48 * _ECC_SHARE, 864, 362.05, 733, _PCIE4, (8, 9)),
        # Source: https://www.nvidia.com/en-us/data-center/products/a10-gpu/.
        _card("A10", 24 * _ECC_SHARE, 600, 125, 0, _PCIE4, (8, 6)),
        # Source: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-
        # nvidia-1758950-r4-web.pdf, SXM. vLLM's start-up logs show 39.39 and 79.15 GiB.
        _card("A100-40GB", 39.39, 1555, 312, 0, _PCIE4, (8, 0), nvlink=600),
        _card("A100-80GB", 79.15, 2039, 312, 0, _PCIE4, (8, 0), nvlink=600),
        # Source: https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (values with sparsity,
        # halved). 79.22 GiB in vLLM: https://github.com/vllm-project/vllm/pull/10511.
        _card("H100-PCIe", 79.22, 2000, 756.5, 1513, _PCIE5, (9, 0)),
        _card("H100-SXM", 79.22, 3350, 989.5, 1979, _PCIE5, (9, 0), nvlink=900),
        # Source: https://www.nvidia.com/en-us/data-center/h200/. CUDA shows about 139 GiB.
        _card("H200", 139, 4800, 989.5, 1979, _PCIE5, (9, 0), nvlink=900),
        # Source: https://www.nvidia.com/en-us/data-center/dgx-b200/, an eighth of its 1,440 GB, 64 TB/s, and 72 PFLOP/s
        # of fp8 with sparsity. The 180 GB are counted as decimal, which is less than CUDA shows.
        _card("B200", 180 * _GB / 2**30, 8000, 2250, 4500, _PCIE5, (10, 0), nvlink=1800),
    )
}
