"""Memory of the outlier columns in products with int8 matrices.

Columns with an input of 6 or more are multiplied in 16 bits, beside copies of their weights.

bitsandbytes' LLM.int8() separates such columns of a matrix product (threshold 6.0, `BitsAndBytesConfig`'s default).
Their number depends on the data. This module counts the expected number for the published shapes before training.
Normed inputs have unit variance, and Qwen's weights are initialized with a deviation of 0.02. Gate and up projections
are then normal, and only their product, the input of `down_proj`, has values of 6 or more. A trained model has other
outliers. In the worst case every column is one, and `down_proj` then needs 9 x hidden_size x intermediate_size bytes
for its product.
"""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, pi, sqrt

from qwen_vram.spec.layers import Weight

# Source: transformers 5.17, BitsAndBytesConfig.llm_int8_threshold; Qwen2Config and Qwen3Config, initializer_range.
_THRESHOLD = 6.0
_INITIALIZER_RANGE = 0.02


def outlier_columns(weight: Weight, rows: int) -> int:
    """Expected number of outlier columns in `rows` rows of the input of `weight`; 0 for all but `down_proj`."""
    out_features, in_features = weight.shape
    if weight.module != "down_proj":
        return 0
    share = _gated_share(out_features)
    return round(in_features * (1 - (1 - share) ** rows))


@lru_cache(maxsize=64)
def _gated_share(hidden_size: int) -> float:
    """P(|silu(gate) x up| >= threshold) for normal gate and up, integrated over gate, exact to three digits."""
    deviation = _INITIALIZER_RANGE * sqrt(hidden_size)
    step = deviation / 100
    total = 0.0
    for index in range(-800, 801):
        gate = index * step
        silu = abs(gate / (1 + exp(-gate)))
        if silu:
            density = exp(-((gate / deviation) ** 2) / 2) / (deviation * sqrt(2 * pi))
            total += density * step * erfc(_THRESHOLD / silu / deviation / sqrt(2))
    return total
