"""Tiles: the rows of a matrix that are quantized or dequantized at once.

The estimator counts tiles by these functions, and the runtime makes the same tiles. `runtime.linear.tiled_4bit` and
`runtime.linear.tiled_int8` make those of bitsandbytes' matrices if `Profile.tiles`. `runtime.backends.bnb_rows` makes
those of a matrix that is quantized for streaming, and `runtime.linear.weight_only` those of torch's own formats.
"""

from __future__ import annotations

from qwen_vram.spec.formats import BLOCK, StorageFormat
from qwen_vram.spec.profile import Profile

# Elements of a tile: 32 MiB in 16 bits.
_TILE_ELEMENTS = 2**24
# bitsandbytes multiplies at most this many rows without dequantizing on every GPU. For more rows its choice of a kernel
# depends on the GPU and the matrix, and the dequantizing kernel is counted.
# Source: bitsandbytes 0.50.2, backends/cuda/ops.py, _GEMM_4BIT_CUSTOM_FLOOR_M.
FUSED_ROWS = 4
# The least and the most rows for which `runtime.linear.many_rows` does not make a 4-bit matrix in 16 bits, and the
# columns of its steps, which divide a row. Fewer rows are faster by `few_rows`.
MANY_ROWS = (4, 64)
_MANY_COLUMNS = 128
# Elements that are quantized at once: 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22
# torch's int4 kernel reads the matrix once for every 16 rows of input; from this number of rows on it is dequantized.
# Source: torch 2.11, int4mm.cu, kMTileSize. Measured: both take the same time between 192 and 256 rows, H100 80GB,
# torch 2.11.0, 2026-11-25, benchmarks/unpack_rows.py.
UNPACK_FROM_ROWS = 192


def tile_rows(out_features: int, in_features: int) -> int:
    """Rows of the matrix in a tile: all of a small matrix, or a multiple of 64, so that tiles hold whole blocks.

    >>> tile_rows(18944, 3584), tile_rows(3584, 3584)
    (4672, 3584)
    """
    return min(out_features, max(BLOCK, _TILE_ELEMENTS // in_features // BLOCK * BLOCK))


def is_tiled(shape: tuple[int, ...], rows: int) -> bool:
    """Tell if a product of `rows` rows with a 4-bit matrix of (out_features, in_features) dequantizes tile by tile."""
    return rows > FUSED_ROWS and tile_rows(*shape) < shape[0]


def by_many_rows(rows: int, width: int) -> bool:
    """Tell if a captured step's product of `rows` rows with a 4-bit matrix of `width` columns has a kernel."""
    least, most = MANY_ROWS
    return least <= rows <= most and width % _MANY_COLUMNS == 0


def counts_tiles(storage: StorageFormat, profile: Profile, shape: tuple[int, ...], rows: int) -> bool:
    """The same for a matrix in a storage format."""
    return profile.tiles and storage.is_bnb_4bit and is_tiled(shape, rows)


def chunk_rows(out_features: int, in_features: int) -> int:
    """Rows of a matrix that are quantized at once: all of them, or a multiple of 64.

    >>> chunk_rows(18944, 3584), chunk_rows(512, 3584)
    (1152, 512)
    """
    return min(out_features, max(BLOCK, _CHUNK_ELEMENTS // in_features // BLOCK * BLOCK))


def unpacks(storage: StorageFormat, rows: int) -> bool:
    """Tell if a format of torch's own operators is dequantized in tiles for a product of `rows` rows, on a GPU."""
    return storage.is_dequantized or (storage.is_tinygemm and rows >= UNPACK_FROM_ROWS)


def int8_rows(out_features: int, in_features: int) -> int:
    """Rows of an int8 product's input that are multiplied at once.

    >>> int8_rows(18944, 3584), int8_rows(3584, 3584)
    (885, 4681)
    """
    return max(64, _TILE_ELEMENTS // max(out_features, in_features))


def int8_tile_elements(out_features: int, in_features: int) -> int:
    """Elements of the buffers for outlier columns of an int8 matrix: at most all of its own, and at least a row."""
    return max(in_features, min(out_features * in_features, _CHUNK_ELEMENTS))
