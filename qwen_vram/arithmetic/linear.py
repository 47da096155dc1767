"""Tensors that are live during `x @ weight.T`, by the format of the weight.

Source: bitsandbytes 0.50.2, gemm_4bit and int8 kernels.
"""

from __future__ import annotations

from qwen_vram.arithmetic.int8_outliers import outlier_columns
from qwen_vram.arithmetic.tiling import FUSED_ROWS, counts_tiles, int8_rows, int8_tile_elements, tile_rows, unpacks
from qwen_vram.arithmetic.weights import format_of
from qwen_vram.spec.architecture import Weight
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile

_FP32 = 4
_FP16 = 2


def linear_bytes(weight: Weight, profile: Profile, rows: int, *, adapted: bool = False) -> int:
    """Bytes alive inside `x @ weight.T` for `rows` rows of x: the result, and buffers of the weight's format.

    4-bit formats of bitsandbytes dequantize the whole matrix (and, where double quantization is used, make the block
    maxima twice in float32), or by tiles one tile of it (and the maxima once); int8 quantizes x, takes outliers out,
    and makes the product in int32, then fp16, then the model's dtype. Exact for those, but for how many outliers the
    data has where `dequantization="whole"`. Formats of torch's own operators are dequantized by tiles, int4 only for
    many rows; for formats of other libraries the dequantized matrix is counted. A LoRA adapter adds its scaled update
    and the sum to the result, once the format's own buffers are gone.
    """
    out_features, _ = weight.shape
    result = rows * out_features * profile.element_bytes
    base = _base_linear_bytes(weight, profile, rows)
    return max(base, 3 * result) if adapted else base


def _base_linear_bytes(weight: Weight, profile: Profile, rows: int) -> int:
    out_features, in_features = weight.shape
    element = profile.element_bytes
    result = rows * out_features * element
    storage = FORMATS[format_of(weight, profile)]
    if unpacks(storage, rows):
        tile = tile_rows(*weight.shape) * in_features
        # int4 takes its pairs of codes apart, half of them at a time, a byte each.
        return result + tile * element + (tile // 2 if storage.bits == 4 else 0)
    if storage.is_dense or storage.library == "torch":
        return result
    if storage.name == "int8" and profile.tiles:
        return _int8_in_pieces(weight, profile, rows)
    if storage.name == "int8":
        return rows * (in_features + _FP32) + max(_int8_working_sets(weight, profile, rows))
    if storage.library == "bitsandbytes" and rows <= FUSED_ROWS:
        return result
    maxima = _FP32 * -(-weight.numel // 64) if storage.is_double else 0
    if counts_tiles(storage, profile, weight.shape, rows):
        return result + tile_rows(*weight.shape) * in_features * element + maxima
    return result + weight.numel * element + 2 * maxima


def _int8_in_pieces(weight: Weight, profile: Profile, rows: int) -> int:
    """An int8 product piece by piece of its rows: the result, and what the first piece takes, whatever the data.

    A piece is quantized and multiplied as whole inputs are (`_int8_working_sets`); then its outliers need as much as
    the input, and of the matrix a tile in int8, float32 and the model's dtype.
    """
    out_features, in_features = weight.shape
    element = profile.element_bytes
    piece = min(rows, int8_rows(*weight.shape))
    codes = piece * in_features
    quantizing = codes * (_FP16 + _FP16 + 1)
    product = piece * out_features * (_FP32 + _FP16 + element)
    tile = int8_tile_elements(*weight.shape) * (1 + _FP32 + element)
    outliers = piece * (out_features + in_features) * element + tile
    result = rows * out_features * element if piece < rows else 0
    return result + piece * _FP32 + max(codes + quantizing, codes + product, outliers)


def _int8_working_sets(weight: Weight, profile: Profile, rows: int) -> tuple[int, int, int]:
    """Beside an int8 product's quantized input: while it is quantized, while outlier weights are, while it multiplies.

    Quantizing holds the input in fp16, its absolute values, and which of them are outliers; outliers (`int8_outliers`)
    their inputs in fp16, and their columns of the matrix in int8 and twice in float32, of which fp16 stays.
    """
    out_features, in_features = weight.shape
    outliers = outlier_columns(weight, rows)
    taken_out = rows * outliers * _FP16
    quantizing = rows * in_features * (_FP16 + _FP16 + 1)
    dequantizing = taken_out + outliers * out_features * (1 + 2 * _FP32)
    product = rows * out_features * (_FP32 + _FP16 + profile.element_bytes)
    return quantizing, dequantizing, taken_out + outliers * out_features * _FP16 + product
