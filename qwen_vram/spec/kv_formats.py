"""Table of KV cache formats: the bytes of keys and values."""

from typing import Literal, NamedTuple

from qwen_vram.errors import UnknownNameError

KvFormatName = Literal["bf16", "int8", "int4"]

# A scale and a least value, in float16 each.
_LEVEL_BYTES = 2 * 2


class KvFormat(NamedTuple):
    """The storage of keys and values in a cache.

    A quantized format keeps its newest tokens, and those of an unfinished group, in the model's own dtype. Older keys
    share a scale and a least value for each channel of `key_group` tokens. Older values share them for each token and
    head.

    Attributes:
        bits: Bits of a code; 0 is the model's own dtype, without codes.
        key_group: Tokens whose keys share a scale.
        residual: Newest tokens that are not quantized.
    """

    name: KvFormatName
    bits: int = 0
    key_group: int = 0
    residual: int = 0

    @property
    def is_quantized(self) -> bool:
        """Tell if older tokens are stored as codes, which every step dequantizes."""
        return self.bits > 0

    @property
    def is_packed(self) -> bool:
        """Tell if two codes share a byte."""
        return self.bits == 4

    @property
    def largest_code(self) -> int:
        """The largest code; the least is 0."""
        return (1 << self.bits) - 1

    def quantized_tokens(self, tokens: int) -> int:
        """Return the number of `tokens` that are codes: whole groups, older than the newest ones."""
        return max(0, tokens - self.residual) // self.key_group * self.key_group if self.is_quantized else 0

    def whole_tokens(self, context_len: int) -> int:
        """Return the tokens for which a cache of `context_len` has memory in the model's own dtype."""
        return min(context_len, self.residual + self.key_group - 1) if self.is_quantized else context_len

    def nbytes(self, tokens: int, *, kv_heads: int, head_dim: int, element_bytes: int) -> int:
        """Bytes of one layer's keys and values for `tokens` tokens of one sequence. Exact.

        >>> kv_format("bf16").nbytes(1024, kv_heads=4, head_dim=128, element_bytes=2)
        2097152
        >>> kv_format("int8").nbytes(1024, kv_heads=4, head_dim=128, element_bytes=2)
        1314816
        """
        width = kv_heads * head_dim
        whole = 2 * width * self.whole_tokens(tokens) * element_bytes
        older = self.quantized_tokens(tokens)
        if not older:
            return whole
        levels = _LEVEL_BYTES * (older // self.key_group * width + older * kv_heads)
        return 2 * width * older * self.bits // 8 + levels + whole


# Source of the quantized layout: KIVI, arXiv:2402.02750.
KV_FORMATS: dict[str, KvFormat] = {
    row.name: row
    for row in (
        KvFormat("bf16"),
        KvFormat("int8", 8, key_group=32, residual=128),
        KvFormat("int4", 4, key_group=32, residual=128),
    )
}
KV_FORMAT_NAMES = tuple(KV_FORMATS)


def kv_format(name: str) -> KvFormat:
    """The KV cache format called `name`.

    Raises:
        UnknownNameError: no format has this name.
    """
    if name not in KV_FORMATS:
        raise UnknownNameError("KV cache format", name, KV_FORMAT_NAMES)
    return KV_FORMATS[name]
