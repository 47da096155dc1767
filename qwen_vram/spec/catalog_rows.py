"""Rows of the catalog: checkpoints with the numbers of their config.json.

Every number is meant to be the one in the named repository's own ``config.json`` (branch ``main``). A test compares the
shapes with the published parameter totals. The positions were read in stored copies and transcriptions.

Only ``head_dim`` of Qwen2.5 is derived: those files do not state it, and the architecture defines it as
``hidden_size // num_attention_heads``. Qwen3's files state it, and it may differ from that quotient.

``max_position_embeddings`` is the file's value. The model card may state a longer one, which can depend on RoPE scaling
that the file does not enable.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """The common numbers of the checkpoints of one architecture and size."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool


class Row(NamedTuple):
    """One published checkpoint."""

    repo_id: str
    shape: Shape
    max_position_embeddings: int

    @property
    def source(self) -> str:
        """The address of the ``config.json`` this row restates."""
        return f"https://huggingface.co/{self.repo_id}/blob/main/config.json"


# In Shape's order: model_type, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads, head_dim, vocab_size, tie_word_embeddings.

# https://huggingface.co/Qwen/Qwen2.5-{size}/blob/main/config.json; the Instruct, Instruct-1M, Coder and
# Math checkpoints of a size have the same shape.
_QWEN2_5_0_5B = Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True)
_QWEN2_5_1_5B = Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True)
_QWEN2_5_3B = Shape("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True)
_QWEN2_5_7B = Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False)
_QWEN2_5_14B = Shape("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False)
_QWEN2_5_32B = Shape("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False)
_QWEN2_5_72B = Shape("qwen2", 8192, 29568, 80, 64, 8, 128, 152064, False)

# https://huggingface.co/Qwen/Qwen3-{size}/blob/main/config.json; the Base and 2507 checkpoints of a size
# have the same shape.
_QWEN3_0_6B = Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True)
_QWEN3_1_7B = Shape("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True)
_QWEN3_4B = Shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True)
_QWEN3_8B = Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False)
_QWEN3_14B = Shape("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False)
_QWEN3_32B = Shape("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False)

ROWS: tuple[Row, ...] = (
    # https://huggingface.co/Qwen/Qwen2.5-{size}/blob/main/config.json
    Row("Qwen/Qwen2.5-0.5B", _QWEN2_5_0_5B, 32768),
    Row("Qwen/Qwen2.5-1.5B", _QWEN2_5_1_5B, 131072),
    Row("Qwen/Qwen2.5-3B", _QWEN2_5_3B, 32768),
    Row("Qwen/Qwen2.5-7B", _QWEN2_5_7B, 131072),
    Row("Qwen/Qwen2.5-14B", _QWEN2_5_14B, 131072),
    Row("Qwen/Qwen2.5-32B", _QWEN2_5_32B, 131072),
    Row("Qwen/Qwen2.5-72B", _QWEN2_5_72B, 131072),
    # https://huggingface.co/Qwen/Qwen2.5-{size}-Instruct/blob/main/config.json
    Row("Qwen/Qwen2.5-0.5B-Instruct", _QWEN2_5_0_5B, 32768),
    Row("Qwen/Qwen2.5-1.5B-Instruct", _QWEN2_5_1_5B, 32768),
    Row("Qwen/Qwen2.5-3B-Instruct", _QWEN2_5_3B, 32768),
    Row("Qwen/Qwen2.5-7B-Instruct", _QWEN2_5_7B, 32768),
    Row("Qwen/Qwen2.5-14B-Instruct", _QWEN2_5_14B, 32768),
    Row("Qwen/Qwen2.5-32B-Instruct", _QWEN2_5_32B, 32768),
    Row("Qwen/Qwen2.5-72B-Instruct", _QWEN2_5_72B, 32768),
    # https://huggingface.co/Qwen/Qwen2.5-{size}-Instruct-1M/blob/main/config.json
    Row("Qwen/Qwen2.5-7B-Instruct-1M", _QWEN2_5_7B, 1010000),
    Row("Qwen/Qwen2.5-14B-Instruct-1M", _QWEN2_5_14B, 1010000),
    # https://huggingface.co/Qwen/Qwen2.5-Coder-{size}/blob/main/config.json
    Row("Qwen/Qwen2.5-Coder-0.5B", _QWEN2_5_0_5B, 32768),
    Row("Qwen/Qwen2.5-Coder-1.5B", _QWEN2_5_1_5B, 32768),
    Row("Qwen/Qwen2.5-Coder-3B", _QWEN2_5_3B, 32768),
    Row("Qwen/Qwen2.5-Coder-7B", _QWEN2_5_7B, 32768),
    Row("Qwen/Qwen2.5-Coder-14B", _QWEN2_5_14B, 32768),
    Row("Qwen/Qwen2.5-Coder-32B", _QWEN2_5_32B, 32768),
    # https://huggingface.co/Qwen/Qwen2.5-Coder-{size}-Instruct/blob/main/config.json
    Row("Qwen/Qwen2.5-Coder-0.5B-Instruct", _QWEN2_5_0_5B, 32768),
    Row("Qwen/Qwen2.5-Coder-1.5B-Instruct", _QWEN2_5_1_5B, 32768),
    Row("Qwen/Qwen2.5-Coder-3B-Instruct", _QWEN2_5_3B, 32768),
    Row("Qwen/Qwen2.5-Coder-7B-Instruct", _QWEN2_5_7B, 32768),
    Row("Qwen/Qwen2.5-Coder-14B-Instruct", _QWEN2_5_14B, 32768),
    Row("Qwen/Qwen2.5-Coder-32B-Instruct", _QWEN2_5_32B, 32768),
    # https://huggingface.co/Qwen/Qwen2.5-Math-{size}/blob/main/config.json
    Row("Qwen/Qwen2.5-Math-1.5B", _QWEN2_5_1_5B, 4096),
    Row("Qwen/Qwen2.5-Math-7B", _QWEN2_5_7B, 4096),
    Row("Qwen/Qwen2.5-Math-72B", _QWEN2_5_72B, 4096),
    # https://huggingface.co/Qwen/Qwen2.5-Math-{size}-Instruct/blob/main/config.json
    Row("Qwen/Qwen2.5-Math-1.5B-Instruct", _QWEN2_5_1_5B, 4096),
    Row("Qwen/Qwen2.5-Math-7B-Instruct", _QWEN2_5_7B, 4096),
    Row("Qwen/Qwen2.5-Math-72B-Instruct", _QWEN2_5_72B, 4096),
    # https://huggingface.co/Qwen/Qwen3-{size}/blob/main/config.json
    Row("Qwen/Qwen3-0.6B", _QWEN3_0_6B, 40960),
    Row("Qwen/Qwen3-1.7B", _QWEN3_1_7B, 40960),
    Row("Qwen/Qwen3-4B", _QWEN3_4B, 40960),
    Row("Qwen/Qwen3-8B", _QWEN3_8B, 40960),
    Row("Qwen/Qwen3-14B", _QWEN3_14B, 40960),
    Row("Qwen/Qwen3-32B", _QWEN3_32B, 40960),
    # https://huggingface.co/Qwen/Qwen3-{size}-Base/blob/main/config.json (no Base of 32B was published)
    Row("Qwen/Qwen3-0.6B-Base", _QWEN3_0_6B, 32768),
    Row("Qwen/Qwen3-1.7B-Base", _QWEN3_1_7B, 32768),
    Row("Qwen/Qwen3-4B-Base", _QWEN3_4B, 32768),
    Row("Qwen/Qwen3-8B-Base", _QWEN3_8B, 32768),
    Row("Qwen/Qwen3-14B-Base", _QWEN3_14B, 32768),
    # https://huggingface.co/Qwen/Qwen3-4B-{Instruct,Thinking}-2507/blob/main/config.json
    Row("Qwen/Qwen3-4B-Instruct-2507", _QWEN3_4B, 262144),
    Row("Qwen/Qwen3-4B-Thinking-2507", _QWEN3_4B, 262144),
)
