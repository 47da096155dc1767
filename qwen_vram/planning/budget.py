"""Budget: what each device offers, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vram.errors import NotSupportedError, UnitError
from qwen_vram.planning.devices import available_ram, visible_gpus
from qwen_vram.units import parse_bytes

VramLike = str | int | Mapping[int, str | int] | None

# Left to the driver and to other processes' small moves where the budget is "what is free now".
FREE_RESERVE = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be used: `vram` bytes of one GPU as nvidia-smi counts them (`None`: no GPU), `ram` bytes of the host."""

    vram: int | None
    ram: int

    @classmethod
    def of(cls, vram: VramLike = None, ram: str | int | None = None) -> Budget:
        """A budget from what a caller wrote; `None` asks the machine what is free now.

        Args:
            vram: `"8GiB"`, an `int` of bytes, or a dict of one device (`{0: "8GiB"}`). `None`: what the first visible
                GPU has free, plus what this process holds already, less 256 MiB. No GPU where there is none, and
                none for `{}`.
            ram: Likewise for the host; `None` is what is available now.

        Raises:
            UnitError: a size without a unit, or a dict that is not keyed by device numbers.
            NotSupportedError: a dict of several devices.
        """
        return cls(
            vram=_free_vram() if vram is None else _one_device(vram) if vram != {} else None,
            ram=available_ram() if ram is None else parse_bytes(ram, name="ram"),
        )


def _one_device(vram: str | int | Mapping[int, str | int]) -> int:
    if not isinstance(vram, Mapping):
        return parse_bytes(vram, name="vram")
    if not all(isinstance(device, int) for device in vram):
        raise UnitError(f"vram maps device numbers to sizes, got {dict(vram)!r}; write {{0: '8GiB'}}", got=vram)
    if len(vram) > 1:
        raise NotSupportedError(
            f"vram for {len(vram)} devices: a plan uses one GPU; pass one size", knob="vram", value=dict(vram)
        )
    device, size = next(iter(vram.items()))
    return parse_bytes(size, name=f"vram[{device}]")


def _free_vram() -> int | None:
    gpus = visible_gpus()
    return max(0, gpus[0].free + gpus[0].used_here - FREE_RESERVE) if gpus else None
