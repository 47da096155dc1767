"""Which GPUs a plan sees: with a stand-in for the driver's library and `torch.cuda`, for cards that are not here."""

import logging
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import qwen_vram as qv
from qwen_vram.planning.capacity import available_memory as devices
from qwen_vram.planning.capacity.available_memory import free_vram, visible_gpus
from qwen_vram.runtime.loading.devices import budget_on, check_free

GIB = 2**30
SEVEN = "Qwen2.5-7B-Instruct"
FIRST, SECOND, THIRD = (f"{digit * 8}-aaaa-bbbb-cccc-{digit * 12}" for digit in "123")


class Driver(ModuleType):
    """NVML over cards of given sizes in GiB; `mig` divides cards into instances, `mute` names functions that raise.

    `generations` are their compute capabilities.
    """

    class NVMLError(Exception):
        pass

    def __init__(self, sizes, *, free=None, used_here=0, mig=None, mute=(), generations=()):
        super().__init__("pynvml")
        self.cards = [f"GPU-{uuid}" for uuid in (FIRST, SECOND, THIRD)][: len(sizes)]
        self.sizes = dict(zip(self.cards, sizes, strict=True))
        self.free, self.used_here, self.mig = free or {}, used_here, mig or {}
        for parts in self.mig.values():
            self.sizes |= parts
        self.generations = dict(zip(self.cards, generations or [(8, 9)] * len(sizes), strict=True))
        for name in mute:
            setattr(self, name, self._refuse)

    def _refuse(self, *about):
        raise self.NVMLError("Unknown Error")

    def nvmlInit(self):
        pass

    nvmlShutdown = nvmlInit

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid if uuid in self.sizes else self._refuse()

    def nvmlDeviceGetHandleByPciBusId(self, place):
        return self.cards[int(place.split(":")[1], 16) - 1]

    def nvmlDeviceGetUUID(self, handle):
        return handle

    def nvmlDeviceGetName(self, handle):
        return handle.encode()

    def nvmlDeviceGetMemoryInfo(self, handle):
        total = self.sizes[handle] * GIB
        return SimpleNamespace(total=total, free=int(self.free.get(handle, self.sizes[handle]) * GIB))

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return list(self.generations[handle]) if handle in self.generations else self._refuse()  # MIG: as a driver may

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.used_here * GIB),
            SimpleNamespace(pid=1, usedGpuMemory=None),
        ]

    def nvmlDeviceGetMigMode(self, handle):
        return [1, 1] if handle in self.mig else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 7 if handle in self.mig else self._refuse()

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):
        return list(self.mig[handle])[index] if index < len(self.mig[handle]) else self._refuse()

    def nvmlDeviceGetGpuInstanceId(self, part):
        return list(next(parts for parts in self.mig.values() if part in parts)).index(part) + 7

    def nvmlDeviceGetComputeInstanceId(self, part):
        return 0


@pytest.fixture
def drive(monkeypatch):
    """Puts a driver in place, with a value of `CUDA_VISIBLE_DEVICES`; `None` takes the variable away."""

    def place(driver, visible=None):
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return place


@pytest.fixture
def cuda(monkeypatch):
    """Puts a `torch.cuda` in place whose GPUs are those of a driver, in an order of its own."""

    def place(driver, order, *, current=0, live=0, reserved=0, uuids=True):
        def facts(number):
            number = getattr(number, "index", number)
            card = driver.cards[order[number]]
            uuid = card.removeprefix("GPU-") if uuids else "00000000-0000-0000-0000-000000000000"
            bus = {"pci_domain_id": 0, "pci_bus_id": order[number] + 1, "pci_device_id": 0}
            return SimpleNamespace(uuid=uuid, name="a card", **bus)

        def capability(device=None):
            return driver.generations[driver.cards[order[getattr(device, "index", device) or 0]]]

        def memory(number=None):
            info = driver.nvmlDeviceGetMemoryInfo(driver.cards[order[getattr(number, "index", number)]])
            return info.free, info.total

        for name, value in {
            "is_initialized": lambda: True,
            "is_available": lambda: True,
            "device_count": lambda: len(order),
            "current_device": lambda: current,
            "get_device_properties": facts,
            "get_device_capability": capability,
            "mem_get_info": memory,
            "memory_allocated": lambda device=None: int(live * GIB),
            "memory_reserved": lambda device=None: int((reserved or live) * GIB),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return place


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        (None, [24, 12, 8]),
        ("0,1,2", [24, 12, 8]),
        ("2, 0", [8, 24]),
        ("1", [12]),
        ("+1", [12]),
        ("1gpu", [12]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("0,-1,1", [24]),
        ("0,7,1", [24]),
        ("7", []),
        ("1,1", []),
        (f"GPU-{SECOND}", [12]),
        ("GPU-2", [12]),
        ("GPU-333,GPU-1111", [8, 24]),
        (f"GPU-{THIRD},GPU-9,GPU-1", [8]),
        (f"GPU-2,GPU-{SECOND}", []),
        ("GPU-", []),  # three cards begin so
    ],
)
def test_every_spelling_of_cuda_visible_devices_is_read_as_cuda_reads_it(drive, visible, sizes):
    drive(Driver([24, 12, 8]), visible)
    assert [gpu.total // GIB for gpu in visible_gpus()] == sizes


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        (None, [20, 8]),  # CUDA shows the first instance of a card that is divided
        ("0", [20]),
        ("GPU-1", [20]),
        ("MIG-aaaaaaaa-0000", [20]),
        ("MIG-bbbb", [10]),
        (f"MIG-GPU-{FIRST}/8/0", [10]),
        ("MIG-cccc", []),
        ("MIG-", []),
    ],
)
def test_instances_of_a_card_that_is_divided_are_found(drive, visible, sizes):
    parts = {"MIG-aaaaaaaa-0000": 20, "MIG-bbbbbbbb-0000": 10}
    drive(Driver([40, 8], mig={f"GPU-{FIRST}": parts}), visible)
    assert [gpu.total // GIB for gpu in visible_gpus()] == sizes


@pytest.mark.parametrize(
    "mute",
    [
        ("nvmlDeviceGetComputeRunningProcesses",),
        ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetName", "nvmlDeviceGetMigMode"),
        ("nvmlDeviceGetUUID", "nvmlDeviceGetComputeRunningProcesses"),
    ],
)
def test_a_card_that_the_driver_tells_by_half_is_there(drive, mute):
    drive(Driver([8], free={f"GPU-{FIRST}": 7}, used_here=1, mute=mute))
    (card,) = visible_gpus()
    assert (card.total, card.free, card.used_here) == (8 * GIB, 7 * GIB, 0)
    assert free_vram() == 7 * GIB
    assert "device='cpu'" not in str(qv.plan(SEVEN, ram="64GiB"))


@pytest.mark.parametrize(
    "mute", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"]
)
def test_a_driver_that_tells_nothing_leaves_torch_to_tell(drive, cuda, mute):
    driver = Driver([24])
    drive(Driver([24], mute=(mute,)))
    assert visible_gpus() == []
    assert free_vram() is None
    drive(Driver([24], mute=("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId", mute)))
    cuda(driver, [0], live=2, reserved=3)
    assert free_vram() == 25 * GIB  # free, and what torch reserved and does not use


@pytest.mark.parametrize("uuids", [True, False])
@pytest.mark.parametrize(("order", "current", "size"), [([0, 1, 2], 1, 12), ([0, 1, 2], 2, 8), ([2, 0, 1], 0, 8)])
def test_the_budget_is_that_of_the_card_that_torch_means(drive, cuda, order, current, size, uuids):
    driver = Driver([24, 12, 8])
    drive(driver)
    cuda(driver, order, current=current, uuids=uuids)
    assert free_vram() == size * GIB
    assert qv.plan(SEVEN, ram="64GiB").budget.vram == size * GIB - 256 * 2**20
    assert budget_on([torch.device("cuda", 0)], None, None, None).vram == [24, 12, 8][order[0]] * GIB - 256 * 2**20


@pytest.mark.parametrize(("live", "reserved", "told"), [(15, 15, 16), (10, 15, 16), (15, 15, 0)])
def test_a_model_that_is_still_bound_is_not_free_memory(drive, cuda, caplog, live, reserved, told):
    driver = Driver([24], free={f"GPU-{FIRST}": 8}, used_here=told)
    drive(driver)
    cuda(driver, [0], live=live, reserved=reserved)
    beside = 8 + max(told, reserved) - live
    assert free_vram() == beside * GIB
    with caplog.at_level(logging.WARNING):
        budget = budget_on([torch.device("cuda", 0)], None, "64GiB", None)
    assert (budget.vram, budget.reserve) == (beside * GIB - 256 * 2**20, 256 * 2**20)
    assert f"already holds {live}.00 GiB in tensors on GPU 0" in caplog.text
    assert "call close() on that model first" in caplog.text
    assert f"the plan is for the {beside}.00 GiB beside them" in caplog.text
    given = budget_on([torch.device("cuda", 0)], "20GiB", "64GiB", None)
    assert (given.vram, given.reserve, given.ram) == (20 * GIB, 0, 64 * GIB)


def test_a_budget_that_an_old_model_takes_is_refused_with_the_cure(drive, cuda):
    driver = Driver([24], free={f"GPU-{FIRST}": 4}, used_here=20)
    drive(driver)
    chosen = qv.plan(SEVEN, vram="20GiB", ram="64GiB")
    cuda(driver, [0], live=19)
    with pytest.raises(
        qv.DoesNotFitError, match=r"hold 19\.00 GiB; if they are a model .* call close\(\) on it"
    ) as caught:
        check_free(chosen, [torch.device("cuda", 0)])
    offered = qv.plan(SEVEN, vram=caught.value.budget_bytes, ram="64GiB")
    assert f"or pass vram={caught.value.budget_bytes} to plan" in str(caught.value)
    check_free(offered, [torch.device("cuda", 0)])
    cuda(driver, [0])
    with pytest.raises(qv.DoesNotFitError, match="other processes hold the rest; end them, or pass vram="):
        check_free(chosen, [torch.device("cuda", 0)])


def test_without_torch_the_first_visible_card_is_asked(drive, monkeypatch):
    drive(Driver([24, 12], used_here=2, free={f"GPU-{SECOND}": 5}), "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert devices.free_vram() == 7 * GIB


@pytest.mark.parametrize(
    ("sizes", "order", "said"),
    [([24, 12], None, True), ([24, 12], "FASTEST_FIRST", True), ([24, 12], "PCI_BUS_ID", False), ([24], None, False)],
)
def test_cards_of_several_kinds_may_be_in_another_order(drive, monkeypatch, caplog, sizes, order, said):
    drive(Driver(sizes))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    with caplog.at_level(logging.WARNING):
        assert free_vram() == 24 * GIB
    assert ("CUDA numbers the fastest one first" in caplog.text) is said
