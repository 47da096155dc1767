import pytest

from qwen_vram import UnitError
from qwen_vram.units import format_bytes, format_gb, format_gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("0.1GB", 10**8),
        ("512MiB", 2**29),
        (8 * 2**30, 8 * 2**30),
    ],
)
def test_sizes_are_read_exactly(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bare", ["8", "8.0", 8, 24, 0])
def test_a_bare_number_is_refused(bare):
    with pytest.raises(UnitError, match=r'vram is a bare number: got .*; write a size with its unit, such as "8GiB"'):
        parse_bytes(bare, name="vram")


@pytest.mark.parametrize("nonsense", ["eight GiB", "8 GiBs", "", "-8GiB", "8Gib/s", None, 8.5, True])
def test_what_is_no_size_is_refused(nonsense):
    with pytest.raises(UnitError, match="vram is not a size: got") as caught:
        parse_bytes(nonsense, name="vram")
    assert caught.value.got is nonsense


def test_text_names_its_unit():
    assert format_gb(15_231_233_024) == "15.23 GB"
    assert format_gib(15_231_233_024) == "14.19 GiB"
    assert format_bytes(2**30) == "1.00 GiB"
