"""The budget: bytes that each device offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_vram.errors import UnitError
from qwen_vram.planning.capacity.available_memory import available_ram, free_vram, oldest_capability
from qwen_vram.units import format_bytes, format_gib, parse_bytes

VramLike = str | int | Mapping[int, str | int] | None

# Kept for the driver and for small changes by other processes, if the budget is the memory that is free now.
FREE_RESERVE = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory that a plan may use: `vram` bytes of GPUs by nvidia-smi (`None`: no GPU), and `ram` bytes of the host.

    Attributes:
        devices: Bytes that each GPU offers, by its number, if the caller named the GPUs; `vram` is their sum.
        reserve: Bytes that stay free on each GPU, or on the host if there is no GPU. They are already subtracted.
        held: Bytes of each GPU, by its number, that this process already takes in addition to torch's memory.
        capability: CUDA compute capability of the oldest of these GPUs, which limits the kernels of a plan. `None` if
            no such GPU is in this machine; the plan is then for 8.0 or newer.
    """

    vram: int | None
    ram: int
    devices: Mapping[int, int] = field(default_factory=dict, hash=False)
    reserve: int = 0
    held: Mapping[int, int] = field(default_factory=dict, hash=False)
    capability: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        vram: VramLike = None,
        ram: str | int | None = None,
        reserve: str | int | None = None,
        held: Mapping[int, int] | None = None,
        number: int | None = None,
    ) -> Budget:
        """Make a budget of a caller's values; `None` asks the machine for the memory that is free now.

        Args:
            vram: `"8GiB"`, an `int` of bytes, or a dict by device number (`{0: "20GiB", 1: "20GiB"}`). `None` is the
                free memory of torch's current GPU, or without torch of the first visible one. Memory of this process
                beside its live tensors counts as free. The budget has no GPU if the machine has no GPU, and for `{}`.
            ram: The same for the host; `None` is the memory that is available now.
            reserve: Bytes of each GPU, or of the host if there is no GPU, that stay free: a size, or 0. `None` is
                256 MiB if `vram` is read from the machine, and 0 otherwise.
            held: As for `Budget`.
            number: CUDA's number of the GPU if `vram` names none; `None` is as for `free_vram`.

        Raises:
            UnitError: a size without a unit, or a dict that is not keyed by device numbers.
        """
        devices, size = by_device(vram), size_of(vram)
        if vram is None:
            size = free_vram(number)
        host = available_ram() if ram is None else parse_bytes(ram, name="ram")
        kept = _reserve(reserve, FREE_RESERVE if vram is None and size is not None else 0)
        if size is None:
            return cls(vram=None, ram=max(0, host - kept), reserve=kept)
        devices = {device: max(0, offered - kept) for device, offered in devices.items()}
        left = sum(devices.values()) if devices else max(0, size - kept)
        oldest = oldest_capability(devices)
        return cls(vram=left, ram=host, devices=devices, reserve=kept, held=held or {}, capability=oldest)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Make a budget of `dataclasses.asdict`'s data, also from JSON, which turns keys that are numbers into texts.

        Raises:
            TypeError, ValueError: a part is missing or has another form.
        """
        by_number = {
            name: {int(device): size for device, size in data.get(name, {}).items()} for name in ("devices", "held")
        }
        capability = data.get("capability")
        if capability is not None:
            major, minor = capability
            capability = (int(major), int(minor))
        return cls(**{**data, **by_number, "capability": capability})

    @property
    def held_on_one(self) -> int:
        """Bytes of `held` on the only GPU; 0 if they are not known."""
        return next(iter(self.held.values()), 0)

    @property
    def given(self) -> VramLike:
        """The value of `vram` that makes this budget again."""
        return {} if self.vram is None else dict(self.devices) or self.vram

    def __str__(self) -> str:
        """The budget in words, such as `8.00 GiB of the GPU`."""
        kept = f" ({format_bytes(self.reserve)} more kept free)" if self.reserve else ""
        if self.vram is None:
            return f"{format_gib(self.ram)} of the host{kept}"
        each = " and ".join(f"{format_gib(size)} of GPU {device}" for device, size in self.devices.items())
        return (each or f"{format_gib(self.vram)} of the GPU") + kept


def size_of(vram: VramLike) -> int | None:
    """Return the bytes of a caller's `vram` in total; `None` for `None`, which asks the machine, and for `{}`, no GPU.

    Raises:
        UnitError: as for `by_device`, or a value that is not a size.
    """
    if vram is None or isinstance(vram, Mapping):
        return sum(by_device(vram).values()) or None
    return parse_bytes(vram, name="vram")


def by_device(vram: VramLike) -> dict[int, int]:
    """Return bytes by device number if `vram` is a dict, in the order of the numbers; otherwise an empty dict.

    Raises:
        UnitError: another key than a device number, or a size without a unit.
    """
    if not isinstance(vram, Mapping):
        return {}
    if not all(type(device) is int and device >= 0 for device in vram):
        raise UnitError(f"vram maps device numbers to sizes, got {dict(vram)!r}; write {{0: '8GiB'}}", got=vram)
    return {device: parse_bytes(vram[device], name=f"vram[{device}]") for device in sorted(vram)}


def _reserve(reserve: str | int | None, default: int) -> int:
    if reserve is None:
        return default
    return 0 if reserve == "0" or (type(reserve) is int and reserve == 0) else parse_bytes(reserve, name="reserve")
