"""Generating as a sequence of allocations, tensor by tensor, for `allocator` to follow.

`activations` says what is alive at each moment and gives the allocated peak at once; here the same tensors come and go
in the order in which `transformers` makes them, which decides how torch's allocator fragments. The two are written
apart, and a test holds one against the other.

Source of the order: transformers 5.17 and 5.23 (modeling_qwen2.py, modeling_qwen3.py, cache_utils.py,
generation/utils.py), bitsandbytes 0.50.2 (the ops.py of backends/cuda and default).
"""

from __future__ import annotations

from qwen_vram.arithmetic.activations import FUSED_ROWS
from qwen_vram.arithmetic.allocator import CachingAllocator
from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.int8_outliers import outlier_columns
from qwen_vram.arithmetic.kv_cache import HOST_CACHE_LAYERS, layer_kv_bytes, quantized_parts, quantized_tokens
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.tiles import counts_tiles, tile_rows, unpacks
from qwen_vram.arithmetic.weights import format_of
from qwen_vram.arithmetic.workload import Workload

# cuBLAS's workspace (32 MiB) and cuBLASLt's (1 MiB), which torch keeps from the first product on.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-22.
CUBLAS_WORKSPACE = (32 * 2**20, 2**20)

_INT64 = 8
_FP32 = 4
_FP16 = 2


def replay_generation(
    allocator: CachingAllocator, architecture: Architecture, profile: Profile, workload: Workload
) -> None:
    """Run a process's first `generate` (or, for `logits="all"`, one plain forward) through `allocator`, in place.

    For one device's part of a model, what crosses to it is taken too: accelerate's hooks bring a step's hidden states
    before the part's first layer, and for every layer anew what the model hands to all of them (mask, cosines and
    sines, position ids), which goes with the layer. The logits go back to the first device, where `generate` is.

    cuBLAS's workspace is taken on the way and stays; everything else is given back.
    Of the decode steps the first three and the last two are run: between them nothing changes but a length.
    """
    _Generation(allocator, architecture, profile, workload).run()


class _Generation:
    """One generation's allocations. Sizes are bytes; T is batch x new tokens of a step."""

    def __init__(
        self, allocator: CachingAllocator, architecture: Architecture, profile: Profile, workload: Workload
    ) -> None:
        self.take, self.give = allocator.take, allocator.give
        self.architecture = architecture
        self.profile = profile
        self.workload = workload
        self.batch = workload.batch_size
        self.element = profile.element_bytes
        self.linears = {weight.module: weight for weight in architecture.block if weight.is_linear}
        self.normed_heads = any("q_norm" in weight.name for weight in architecture.block)
        self.warm = False
        # Keys and values of each layer, once there are some.
        self.cache: list[list[int]] = [[] for _ in range(architecture.num_hidden_layers)]

    def run(self) -> None:
        prompt = self.batch * self.workload.prompt_len * _INT64
        inputs = self.of_generate(prompt, prompt)
        if self.workload.logits == "all":
            self.give(*self.step(self.workload.prompt_len, 0), *inputs)
            return
        positions = self.of_generate(prompt, prompt)
        flags = self.of_generate(*[self.batch * _INT64] * 3)
        logits = self.prefill()
        ids: list[int] = []
        length = self.workload.prompt_len
        for index in range(self.workload.max_new_tokens):
            if 3 <= index < self.workload.max_new_tokens - 2:
                length += 1
                continue
            if index:
                logits = self.step(1, length)
                length += 1
            ids = self.sample(logits, ids, length)
        self.give(*ids, *flags, *positions, *inputs, *(block for layer in self.cache for block in layer))

    def of_generate(self, *sizes: int) -> list[int]:
        """Tensors of `generate`'s own, which are where the model starts."""
        return [self.take(size) for size in sizes] if self.architecture.starts else []

    def prefill(self) -> list[int]:
        """All chunks; where neither cache nor mask grows, the first three and the last two, which are all alike."""
        prompt = self.workload.prompt_len
        chunk = self.profile.prefill_chunk_size or prompt
        starts = list(range(0, prompt, chunk))
        if self.profile.cache != "dynamic" and not self.masked(2, chunk) and len(starts) > 5:
            starts = starts[:3] + starts[-2:]
        logits: list[int] = []
        for start in starts:
            following = self.step(min(chunk, prompt - start), start)
            self.give(*logits)
            logits = following
        return logits

    def sample(self, logits: list[int], ids: list[int], length: int) -> list[int]:
        if not self.architecture.starts:
            return []
        scores = self.take(self.batch * self.architecture.vocab_size * _FP32)
        self.give(*logits)
        token = self.take(self.batch * _INT64)
        longer = self.take(self.batch * (length + 1) * _INT64)
        self.give(*ids, scores, token)
        return [longer]

    def step(self, queries: int, past: int) -> list[int]:
        """One forward; returns the logits' block where `generate` reads it."""
        take, give = self.take, self.give
        rows = self.batch * queries
        hidden_size = rows * self.architecture.hidden_size * self.element
        hidden = take(hidden_size)  # the embeddings, or what comes from the device before
        kept = [hidden, *self.shared(rows, queries, past)] if self.architecture.starts else []
        for layer in range(self.architecture.num_hidden_layers):
            copies = [] if self.architecture.starts else self.copies(rows, queries, past)
            following = self.layer(layer, hidden_size, queries, past)
            give(*copies)
            if hidden not in kept:
                give(hidden)
            hidden = following
        normed = [self.norm(rows, self.architecture.hidden_size)] if self.architecture.ends else []
        give(hidden, *kept)
        return self.logits(rows if self.workload.logits == "all" else self.batch, normed)

    def shared(self, rows: int, queries: int, past: int) -> list[int]:
        """What the model makes once for all layers: cosines and sines, and the mask."""
        # The padding mask as booleans, and whether it is all true.
        self.give(self.take(self.batch * (past + queries)), self.take(1))
        mask = self.mask(queries, past)
        return [*self.rotary_tables(rows), *mask]

    def copies(self, rows: int, queries: int, past: int) -> list[int]:
        """The same, brought over for one layer of a later device; position ids come along."""
        mask = rows * self.seen(queries, past) * (self.element if self.profile.attention == "eager" else 1)
        tables = rows * self.architecture.head_dim * self.element
        sizes = [*([mask] if self.masked(queries, past) else []), tables, tables, rows * _INT64]
        return [self.take(size) for size in sizes]

    def logits(self, rows: int, normed: list[int]) -> list[int]:
        """The head's product, or its copy for `generate`; a shared head gets the last rows from the last device."""
        if not self.architecture.has_head:
            self.give(*normed)
            return self.of_generate(rows * self.architecture.vocab_size * self.element)
        normed = normed or [self.take(rows * self.architecture.hidden_size * self.element)]
        logits = self.product(self.architecture.head, rows)
        self.give(*normed)
        if self.architecture.starts:
            return [logits]
        self.give(logits)
        return []

    def masked(self, queries: int, past: int) -> bool:
        """Whether attention gets an explicit mask; the rules are `activations`'."""
        kind = self.profile.attention
        if kind == "flash_attention_2":
            return False
        if kind == "eager" or self.workload.padded:
            return True
        if self.profile.cache == "static":
            return past > 0
        return kind == "sdpa" and queries > 1 and past > 0

    def seen(self, queries: int, past: int) -> int:
        """Keys that attention reads for each sequence."""
        return self.workload.context_len if self.profile.cache == "static" else past + queries

    def mask(self, queries: int, past: int) -> list[int]:
        if not self.masked(queries, past):
            return []
        one, every = queries * self.seen(queries, past), self.batch * queries * self.seen(queries, past)
        causal = self.take(one)
        causal = self.replace(causal, self.take(one))
        mask = self.replace(causal, self.take(every))
        if self.profile.attention == "eager":
            mask = self.replace(mask, self.take(every * self.element))
        return [mask]

    def rotary_tables(self, rows: int) -> list[int]:
        take, give = self.take, self.give
        wide = rows * self.architecture.head_dim
        positions = take(rows * _FP32)
        angles = take(wide // 2 * _FP32)
        self.warm_up()  # the rotary angles are a fresh process's first matrix product
        give(positions)
        both = take(wide * _FP32)
        scaled = []
        for _ in range(2):  # cosine and sine, each scaled into a tensor of its own
            raw = take(wide * _FP32)
            scaled.append(take(wide * _FP32))
            give(raw)
        tables = [take(wide * self.element), take(wide * self.element)]
        give(angles, both, *scaled)
        return tables

    def warm_up(self) -> None:
        """The first matrix product on a device takes workspaces that stay."""
        if not self.warm:
            self.warm = True
            for size in CUBLAS_WORKSPACE:
                self.take(size)

    def layer(self, layer: int, hidden_size: int, queries: int, past: int) -> int:
        take, give = self.take, self.give
        rows = self.batch * queries
        normed = self.norm(rows, self.architecture.hidden_size)
        attended, scores = self.attention(layer, queries, past)
        give(normed)
        residual = take(hidden_size)
        give(attended)
        normed = self.norm(rows, self.architecture.hidden_size)
        inner = rows * self.architecture.intermediate_size * self.element
        gate = self.linear("gate_proj", rows)
        activated = take(inner)
        give(gate)
        up = self.linear("up_proj", rows)
        product = take(inner)
        give(activated, up)
        down = self.linear("down_proj", rows)
        give(product, normed)
        result = take(hidden_size)
        give(down, residual, *scores)
        return result

    def attention(self, layer: int, queries: int, past: int) -> tuple[int, list[int]]:
        """The attended block, and eager attention's softmax, which the layer's caller keeps to its end."""
        rows = self.batch * queries
        wide = rows * self.architecture.attention_width * self.element
        narrow = rows * self.architecture.key_value_width * self.element
        query = self.linear("q_proj", rows)
        if self.normed_heads:
            query = self.replace(query, self.norm(rows, self.architecture.attention_width))
        key = self.linear("k_proj", rows)
        if self.normed_heads:
            key = self.replace(key, self.norm(rows, self.architecture.key_value_width))
        value = self.linear("v_proj", rows)
        rotated, rotated_key = self.rotate(wide), self.rotate(narrow)
        self.give(query, key)
        stored = self.update(layer, rotated_key, value, queries, past)
        result, scores = self.kernel(queries, past)
        self.give(*stored)
        out = self.linear("o_proj", rows)
        self.give(result, rotated)
        return out, scores

    def replace(self, old: int, new: int) -> int:
        self.give(old)
        return new

    def rotate(self, size: int) -> int:
        """Rotary embedding of a tensor: x * cos + rotate_half(x) * sin."""
        take, give = self.take, self.give
        straight = take(size)
        negated = take(size // 2)
        turned = take(size)
        give(negated)
        scaled = take(size)
        give(turned)
        result = take(size)
        give(straight, scaled)
        return result

    def update(self, layer: int, key: int, value: int, queries: int, past: int) -> list[int]:
        """Put a step's keys and values into the cache; returns what attention still holds of them."""
        if self.workload.logits == "all":
            return [key, value]
        held = self.cache[layer]
        if self.profile.kv_cache != "bf16":
            return self.update_quantized(layer, key, value, queries, past)
        if self.profile.cache != "dynamic":
            whole = layer_kv_bytes(
                self.architecture, self.profile, tokens=self.workload.context_len, batch_size=self.batch
            )
            if self.profile.kv_device == "host":
                # The first layer takes the slots, keys and values in one block, and all share them.
                if not self.cache[0]:
                    slots = min(self.architecture.num_hidden_layers, HOST_CACHE_LAYERS)
                    self.cache[0].extend(self.take(whole) for _ in range(slots))
            elif not held:
                held.extend(self.take(whole // 2) for _ in range(2))
            self.give(key, value)
            return []
        size = self.batch * (past + queries) * self.architecture.key_value_width * self.element
        for index in range(2):
            longer = self.take(size)
            if len(held) > index:
                self.give(held[index])
                held[index] = longer
            else:
                held.append(longer)
        self.give(key, value)
        return []

    def update_quantized(self, layer: int, key: int, value: int, queries: int, past: int) -> list[int]:
        """Every token in the model's dtype for attention, and those that grow old quantized through float32."""
        take, give = self.take, self.give
        width = self.architecture.key_value_width
        if not self.cache[layer]:
            sizes = quantized_parts(
                self.architecture, self.profile, tokens=self.workload.context_len, batch_size=self.batch
            )
            self.cache[layer].extend(take(size) for size in sizes)
        every = [key, value]
        if past:
            half = take(self.batch * quantized_tokens(past) * width // 2) if self.profile.kv_cache == "int4" else None
            every = [take(self.batch * (past + queries) * width * self.element) for _ in range(2)]
            give(*([] if half is None else [half]))
        tokens = self.batch * (quantized_tokens(past + queries) - quantized_tokens(past)) * width
        for _ in range(2 if tokens else 0):
            give(*(take(tokens * size) for size in (_FP32, 1)))
        if past:
            give(key, value)
        return every

    def kernel(self, queries: int, past: int) -> tuple[int, list[int]]:
        """Attention itself; returns its result, and what eager attention returns beside it."""
        take, give = self.take, self.give
        rows, seen = self.batch * queries, self.seen(queries, past)
        wide = self.architecture.attention_width * self.element
        heads = self.architecture.num_attention_heads
        masked = self.masked(queries, past)
        grouped = heads > self.architecture.num_key_value_heads
        expanded = [take(self.batch * seen * wide) for _ in range(2)] if masked and grouped else []
        scores = []
        if self.profile.attention == "eager":
            result, softmax = self.eager(rows, seen, heads)
            scores = [softmax]
        else:
            bias = [take(rows * seen * self.element)] if masked else []
            result = take(rows * wide)
            give(take(rows * heads * _FP32), *bias)
        give(*expanded)
        return result, scores

    def eager(self, rows: int, seen: int, heads: int) -> tuple[int, int]:
        """Scores, scaled, masked, softmax in float32, cast back, times values."""
        take, give = self.take, self.give
        scores = heads * rows * seen
        raw = take(scores * self.element)
        scaled = take(scores * self.element)
        give(raw)
        masked = take(scores * self.element)
        give(scaled)
        if self.element == _FP32:
            weights = take(scores * _FP32)
            give(masked)
        else:
            wide = take(scores * _FP32)
            softmax = take(scores * _FP32)
            give(wide)
            weights = take(scores * self.element)
            give(softmax, masked)
        out = take(rows * self.architecture.attention_width * self.element)
        result = take(rows * self.architecture.attention_width * self.element)
        give(out)
        return result, weights

    def norm(self, rows: int, width: int) -> int:
        """RMSNorm: in float32 on the way, for rows of `width`; the heads' norms see the same bytes."""
        take, give = self.take, self.give
        wide = rows * width * _FP32
        upcast = take(wide)
        squares = take(wide)
        mean = take(rows * _FP32)
        give(squares)
        shifted = take(rows * _FP32)
        root = take(rows * _FP32)
        give(shifted)
        scaled = take(wide)
        give(root, upcast)
        rounded = take(rows * width * self.element)
        result = take(rows * width * self.element)
        give(rounded, scaled, mean)
        return result

    def linear(self, name: str, rows: int) -> int:
        return self.product(self.linears[name], rows)

    def product(self, weight: Weight, rows: int) -> int:
        """A matrix product in the weight's format, and an adapter's update on top; returns the result."""
        self.warm_up()
        result = self.base_product(weight, rows)
        if weight.module not in self.architecture.adapted:
            return result
        size = rows * weight.shape[0] * self.element
        update = self.take(size)
        scaled = self.take(size)
        self.give(update)
        total = self.take(size)
        self.give(result, scaled)
        return total

    def base_product(self, weight: Weight, rows: int) -> int:
        take, give = self.take, self.give
        out = weight.shape[0]
        storage = FORMATS[format_of(weight, self.profile)]
        result_size = rows * out * self.element
        fused = storage.library == "bitsandbytes" and storage.bits == 4 and rows <= FUSED_ROWS
        if unpacks(storage, rows):
            return self.unpacked_product(weight, result_size, storage.bits)
        if storage.is_dense or storage.library == "torch" or fused:
            return take(result_size)
        if storage.name == "int8":
            return self.int8_product(weight, rows)
        maxima = []
        if counts_tiles(storage, self.profile, weight.shape, rows):
            if storage.name != "nf4-plain":
                maxima = [take(-(-weight.numel // 64) * _FP32)]
            result, tile = take(result_size), take(tile_rows(*weight.shape) * weight.shape[1] * self.element)
            give(tile, *maxima)
            return result
        if storage.name in ("nf4", "fp4"):
            maxima = [take(-(-weight.numel // 64) * _FP32) for _ in range(2)]
        dequantized = take(weight.numel * self.element)
        result = take(result_size)
        give(*maxima, dequantized)
        return result

    def unpacked_product(self, weight: Weight, result_size: int, bits: int) -> int:
        """The result, and the first and largest tile, which int4 fills from two halves of its codes."""
        take, give = self.take, self.give
        elements = tile_rows(*weight.shape) * weight.shape[1]
        result, tile = take(result_size), take(elements * self.element)
        for _ in range(2 if bits == 4 else 0):
            give(take(elements // 2))
        give(tile)
        return result

    def int8_product(self, weight: Weight, rows: int) -> int:
        """LLM.int8(): quantize the input, take outlier columns out, multiply, put them back."""
        take, give = self.take, self.give
        out, inner = weight.shape
        outliers = outlier_columns(weight, rows)
        half = take(rows * inner * _FP16)
        scales, codes = take(rows * _FP32), take(rows * inner)
        magnitudes = take(rows * inner * _FP16)
        flags = take(rows * inner)
        give(magnitudes)
        give(flags, half)
        apart = []
        if outliers:
            columns = outliers * out
            apart.append(take(rows * outliers * _FP16))
            stored, raw, scaled = take(columns), take(columns * _FP32), take(columns * _FP32)
            give(raw, stored)
            apart.append(take(columns * _FP16))
            give(scaled)
        product = take(rows * out * _FP32)
        rounded = take(rows * out * _FP16)
        result = take(rows * out * self.element)
        give(rounded, product)
        if outliers:
            result = self.replace(result, take(rows * out * self.element))
        give(*apart, codes, scales)
        return result
