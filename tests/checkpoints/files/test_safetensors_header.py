"""The entries of a safetensors header: sizes of equal shapes are computed once, and each entry is still checked."""

import json

import pytest

import qwen_vram as qv
from qwen_vram.checkpoints.files.safetensors_header import parse_header


def header(**entries):
    """The bytes of a header, from shape and offsets of each tensor in bf16."""
    made = {name: {"dtype": "BF16", "shape": shape, "data_offsets": span} for name, (shape, span) in entries.items()}
    return json.dumps(made).encode()


def parsed(tmp_path, **entries):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x08" + bytes(7) + b"{}      ")
    return parse_header(header(**entries), path.name, source=path)


def test_tensors_of_one_shape_have_their_own_offsets(tmp_path):
    tensors, end = parsed(tmp_path, a=([4, 2], [0, 16]), b=([4, 2], [16, 32]), c=([3], [32, 38]))
    data_at = 8 + len(header(a=([4, 2], [0, 16]), b=([4, 2], [16, 32]), c=([3], [32, 38])))
    assert end == 38
    assert [(one.shape, one.nbytes, one.offset - data_at) for one in tensors.values()] == [
        ((4, 2), 16, 0), ((4, 2), 16, 16), ((3,), 6, 32)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "span", "why"),
    [
        ([4, 2], [16, 33], r"'b' of shape \[4, 2\] takes 17 bytes in it"),
        ([4, 2], [18, 34], "its tensors overlap or leave a hole at byte 16"),
        ([4.5, 2], [16, 34], "ValueError in its header"),
        (["4", 2], [16, 32], "ValueError in its header"),
        ([-4, -2], [16, 32], "ValueError in its header"),
        ([[4], 2], [16, 32], "TypeError in its header"),
    ],
)
def test_a_second_tensor_is_checked_as_the_first(tmp_path, shape, span, why):
    with pytest.raises(qv.CheckpointError, match=f"shard 'model.safetensors' is corrupt: {why}"):
        parsed(tmp_path, a=([4, 2], [0, 16]), b=(shape, span))
