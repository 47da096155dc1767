"""The table of cards: names, plausible figures, and the machine that the times are computed for."""

import pytest

import qwen_vram as qv
from qwen_vram.spec.cards.find import find_gpu, machine_of
from qwen_vram.spec.cards.rows import GPUS
from qwen_vram.spec.machine import DEVICE_BANDWIDTH, MATMUL_RATE

ASKED = (
    "RTX 3060 12GB", "RTX 3090", "RTX 4060 Ti 16GB", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 5070 Ti", "RTX 5080",
    "RTX 5090", "T4", "L4", "L40S", "A10", "A100-40GB", "A100-80GB", "H100-PCIe", "H100-SXM", "H200", "B200",
    "RTX PRO 6000",
)  # fmt: skip


def test_the_table_has_every_card_that_is_asked_for():
    assert set(ASKED) <= set(GPUS)


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda card: card.name)
def test_figures_are_those_of_a_card(card):
    assert 11 * 2**30 < card.memory < 200 * 2**30
    assert 280e9 <= card.bandwidth <= 8e12
    # A card multiplies 16-bit numbers 70 to 420 times as fast as it reads bytes.
    assert 70 < card.flops / card.bandwidth < 420
    assert card.fp8_flops == 0 or 1.99 < card.fp8_flops / card.flops < 2.03
    assert (card.fp8_flops > 0) == (card.capability >= (8, 9))
    assert card.link_rate >= card.pcie_rate
    assert (card.link == "PCIe") == (card.link_rate == card.pcie_rate)
    assert card.has_bf16 == (card.name != "T4")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("a100", "A100-80GB"),
        ("A100 40GB", "A100-40GB"), ("h100", "H100-SXM"), ("h100 pcie", "H100-PCIe"), ("l40s", "L40S"),
    ],
)  # fmt: skip
def test_names_are_found_in_any_spelling(name, found):
    assert find_gpu(name).name == found


@pytest.mark.parametrize("name", ["RTX 9999", "", "4060", None])
def test_an_unknown_card_lists_the_known_ones(name):
    with pytest.raises(
        qv.UnknownNameError, match="unknown GPU .* choose from RTX 3060 12GB, RTX 3090, .*B200"
    ) as refused:
        find_gpu(name)
    assert refused.value.got == name
    assert refused.value.allowed == tuple(GPUS)


def test_the_machine_of_the_measured_card_has_its_measured_rates():
    machine = machine_of(GPUS["H200"])
    assert (machine.device_bandwidth, machine.matmul_rate) == (DEVICE_BANDWIDTH, MATMUL_RATE)
    assert machine.device == "NVIDIA H200"
    assert machine.source == "default"
    half = machine_of(GPUS["H100-SXM"])
    assert half.device_bandwidth == pytest.approx(DEVICE_BANDWIDTH * 3350 / 4800)
    assert machine_of(GPUS["L4"], fp8=True).matmul_rate == pytest.approx(
        2 * machine_of(GPUS["L4"]).matmul_rate, rel=0.01
    )
    assert machine_of(GPUS["A10"], fp8=True) == machine_of(GPUS["A10"])
