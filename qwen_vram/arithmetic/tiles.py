"""Tiles: how many rows of a matrix are dequantized at once where `dequantization="tiled"`, or quantized for streaming.

The estimator counts what `runtime.tiled_linear` and `runtime.backends.bnb_rows` take by these functions.
"""

from __future__ import annotations

from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.storage import StorageFormat

# Elements of a tile: 32 MiB in 16 bits. Below so many rows of input bitsandbytes' own kernels, some of which dequantize
# nothing, are left to choose.
_TILE_ELEMENTS = 2**24
_FROM_ROWS = 64


def tile_rows(out_features: int, in_features: int) -> int:
    """Rows of the matrix in a tile, all of them where it is small; a multiple of 64, so that tiles hold whole blocks.

    >>> tile_rows(18944, 3584), tile_rows(3584, 3584)
    (4672, 3584)
    """
    return min(out_features, max(64, _TILE_ELEMENTS // in_features // 64 * 64))


def is_tiled(shape: tuple[int, ...], rows: int) -> bool:
    """Whether a product of `rows` rows with a 4-bit matrix of (out_features, in_features) goes by tiles."""
    return rows >= _FROM_ROWS and tile_rows(*shape) < shape[0]


def counts_tiles(storage: StorageFormat, profile: Profile, shape: tuple[int, ...], rows: int) -> bool:
    """The same for a matrix in a storage format."""
    four_bit = storage.library == "bitsandbytes" and storage.bits == 4
    return profile.dequantization == "tiled" and four_bit and is_tiled(shape, rows)


def head_by_tiles(profile: Profile) -> bool:
    """Whether a quantized head is brought to the device tile by tile: where layers stream, it is the largest tensor."""
    return profile.streamed_layers > 0 and profile.head_format != profile.dtype
