"""Allocations of attention and its KV cache in their order, for the replay.

Source of the order: transformers 5.17 and 5.23 (modeling_qwen2.py, masking_utils.py, cache_utils.py), and this
library's own caches.
"""

from __future__ import annotations

from qwen_vram.arithmetic.attention import attention_parts, bias_columns, joined_rows
from qwen_vram.arithmetic.kv_cache import HOST_CACHE_LAYERS, all_kv_bytes, largest_kv_bytes, layer_kv_bytes
from qwen_vram.arithmetic.replay.linear import Products
from qwen_vram.arithmetic.replay.trace import Consumer
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import Attention as AttentionSpec
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

_FP32 = 4
_INT64 = 8


class Attention(Products):
    """The allocations of attention and its cache in a step of `queries` new tokens after `past` earlier ones."""

    def __init__(self, consumer: Consumer, architecture: Architecture, profile: Profile, workload: Workload) -> None:
        super().__init__(consumer, architecture, profile)
        self.workload = workload
        # A prompt over pages is fed alone. Its decode steps have all requests.
        self.paged = profile.cache == "paged"
        self.decoding = False
        # The float32 copy of a step's logits, while `generate` keeps it.
        self.scores: list[int] = []
        # Keys and values of each layer; empty before the first step.
        self.cache: list[list[int]] = [[] for _ in range(architecture.num_hidden_layers)]

    @property
    def batch(self) -> int:
        """The number of sequences of a step."""
        return 1 if self.paged and not self.decoding else self.workload.batch_size

    def masked(self, queries: int, past: int) -> bool:
        """Tell if attention gets an explicit mask: padding, an unfinished cache before the chunk, or a static cache."""
        kind = self.profile.attention
        if kind == "flash_attention_2":
            return False
        if kind == "eager" or self.workload.padded:
            return True
        if self.profile.attends_whole:
            return past > 0 or kind == "fused"
        return kind == "sdpa" and queries > 1 and past > 0

    def seen(self, queries: int, past: int) -> int:
        """Keys that attention reads for each sequence."""
        return self.workload.context_len if self.profile.attends_whole else past + queries

    def mask(self, queries: int, past: int) -> list[int]:
        """The mask that all layers share; empty without a mask."""
        if not self.masked(queries, past):
            return []
        one, every = queries * self.seen(queries, past), self.batch * queries * self.seen(queries, past)
        causal = self.take(one)
        causal = self.replace(causal, self.take(one))
        mask = self.replace(causal, self.take(every))
        if self.profile.attention == "eager":
            mask = self.replace(mask, self.take(every * self.element))
        return [mask]

    def attention(self, number: int, queries: int, past: int) -> tuple[int, list[int]]:
        """Return attention's result, and eager attention's softmax, which the caller keeps to the layer's end."""
        rows, of = self.batch * queries, self.architecture.layers[number].attention
        wide, narrow = rows * of.width * self.element, rows * of.key_value_width * self.element
        self.at("attention q_proj")
        query = self.linear(number, "q_proj", rows)
        if of.head_norms:
            query = self.replace(query, self.norm(rows, of.width, "attention q_norm"))
        self.at("attention k_proj")
        key = self.linear(number, "k_proj", rows)
        if of.head_norms:
            key = self.replace(key, self.norm(rows, of.key_value_width))
        self.at("attention v_proj")
        value = self.linear(number, "v_proj", rows)
        self.at("attention rotary")
        rotated, rotated_key = query, key
        if self.profile.kernels == "plain":
            rotated = self.rotate(wide)
            self.at("")
            rotated_key = self.rotate(narrow)
            self.give(query, key)
        self.at("attention cache")
        stored = self.update(number, rotated_key, value, queries, past)
        self.at("attention kernel")
        result, scores = self.kernel(of, queries, past)
        self.give(*stored)
        self.at("attention o_proj")
        out = self.linear(number, "o_proj", rows)
        self.give(result, rotated)
        return out, scores

    def rotate(self, size: int) -> int:
        """Apply the rotary embedding to a tensor: x * cos + rotate_half(x) * sin."""
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

    def update(self, number: int, key: int, value: int, queries: int, past: int) -> list[int]:
        """Put a step's keys and values into the cache; return the blocks of them that attention still holds."""
        if self.workload.logits == "all":
            return [key, value]
        held, layer = self.cache[number], self.architecture.layers[number]
        if self.paged:
            return self.update_pages(layer, key, value, queries, past)
        if self.profile.kv_format.is_quantized:
            return self.update_quantized(layer, key, value, queries, past)
        if self.profile.cache != "dynamic":
            context = {"tokens": self.workload.context_len, "batch_size": self.batch}
            if self.profile.kv_device == "host":
                # The first layer allocates the slots, keys and values in one block, and all layers share them.
                if not self.cache[0]:
                    slots = min(self.architecture.num_hidden_layers, HOST_CACHE_LAYERS)
                    largest = largest_kv_bytes(self.architecture, self.profile, **context)
                    self.cache[0].extend(self.keep(largest) for _ in range(slots))
            elif self.profile.cache == "preallocated":
                self.take_for_all_layers()
            elif not held:
                whole = layer_kv_bytes(layer, self.profile, **context)
                held.extend(self.keep(whole // 2) for _ in range(2))
            self.give(key, value)
            return []
        self.lengthen(held, self.batch * (past + queries) * layer.attention.key_value_width * self.element)
        self.give(key, value)
        return []

    def lengthen(self, held: list[int], size: int) -> None:
        """Allocate a growing cache's keys, then its values, in `size` bytes each, before the old ones are freed."""
        for index in range(2):
            longer = self.keep(size)
            if len(held) > index:
                self.drop(held[index])
                held[index] = longer
            else:
                held.append(longer)

    def take_for_all_layers(self) -> None:
        """Allocate a preallocated cache's block, which the first layer does for all layers."""
        if not self.cache[0]:
            context = self.workload.context_len
            nbytes = all_kv_bytes(self.architecture, self.profile, tokens=context, batch_size=self.batch)
            self.cache[0].append(self.keep(nbytes))

    def take_pages(self) -> None:
        """Allocate the pages of all layers, which are made at load and stay."""
        from qwen_vram.spec.batching.pages import pool_tokens  # only for pages

        tokens = pool_tokens(self.workload.batch_size, self.workload.context_len)
        for layer, held in zip(self.architecture.layers, self.cache, strict=True):
            whole = layer_kv_bytes(layer, self.profile, tokens=tokens, batch_size=1)
            held.extend(self.keep(whole // 2) for _ in range(2))

    def update_pages(self, layer: LayerSpec, key: int, value: int, queries: int, past: int) -> list[int]:
        """Write a step's keys and values into pages, and gather those that attention reads from several pages.

        A captured step's kernel reads the pages themselves.
        """
        if self.decoding and self.profile.captures:
            self.give(key, value)
            return []
        if not past:
            return [key, value]
        tokens = self.batch * (past + queries)
        if self.decoding:
            from qwen_vram.spec.batching.pages import PAGE, pages_of  # only for pages

            tokens = self.batch * pages_of(self.workload.context_len) * PAGE
            self.give(self.take(tokens * _INT64))  # the rows of all pages
        every = [self.take(tokens * layer.attention.key_value_width * self.element) for _ in range(2)]
        self.give(key, value)
        return every

    def update_quantized(self, layer: LayerSpec, key: int, value: int, queries: int, past: int) -> list[int]:
        """Make all tokens in the model's dtype for attention, and quantize those that become old through float32."""
        take, give = self.take, self.give
        width, kept = layer.attention.key_value_width, self.profile.kv_format
        self.take_for_all_layers()
        every = [key, value]
        if past:
            self.at("")  # half of the int4 codes are unpacked beside them; no measured row shows if the peak is here
            half = take(self.batch * kept.quantized_tokens(past) * width // 2) if kept.is_packed else None
            every = [take(self.batch * (past + queries) * width * self.element) for _ in range(2)]
            give(*([] if half is None else [half]))
            self.at("attention cache")
        self.quantize(width, kept.quantized_tokens(past + queries) - kept.quantized_tokens(past))
        if past:
            give(key, value)
        return every

    def quantize(self, width: int, tokens: int) -> None:
        """Quantize `tokens` tokens of each sequence, `width` elements each: keys, then values, through float32."""
        elements = self.batch * tokens * width
        for _ in range(2 if elements else 0):
            self.give(*(self.take(elements * size) for size in (_FP32, 1)))

    def kernel(self, of: AttentionSpec, queries: int, past: int) -> tuple[int, list[int]]:
        """Run attention itself; return its result, and eager attention's softmax."""
        take, give = self.take, self.give
        rows, seen = self.batch * queries, self.seen(queries, past)
        wide, heads = of.width * self.element, of.heads
        masked = self.masked(queries, past)
        fused = masked and self.profile.attention == "fused"
        expands = masked and of.is_grouped and not (fused and queries == 1)
        expanded = [take(self.batch * seen * wide) for _ in range(2)] if expands else []
        scores = []
        if self.profile.attention == "eager":
            result, softmax = self.eager(of, rows, seen)
            scores = [softmax]
        elif fused:
            bias = take(rows * bias_columns(seen) * self.element)
            result = take(rows * wide)
            give(bias)
        elif self.profile.attention == "fused" and self.parts(queries, past):
            join = self.joined if self.profile.kernels == "plain" else self.joined_in_place
            result = join(of, queries, self.parts(queries, past))
        else:
            biases = [take(rows * seen * self.element)] if masked else []
            result = take(rows * wide)
            give(take(rows * heads * _FP32), *biases)
        give(*expanded)
        return result, scores

    def parts(self, queries: int, past: int) -> int:
        """Parts of fused attention before the last one; 0 if it is not computed in parts."""
        return len(attention_parts(queries, past, padded=self.profile.kernels == "fused"))

    def joined_in_place(self, of: AttentionSpec, queries: int, others: int) -> int:
        """Run attention in `others` + 1 parts; one kernel joins each part to those before it."""
        take, give = self.take, self.give
        rows, filled = self.batch * queries, self.batch * joined_rows(queries, padded=True)
        wide, heads = of.width, of.heads
        padded = [take(filled * wide * self.element)] if filled > rows else []
        total, sums = take(filled * wide * self.element), take(filled * heads * _FP32)
        if others > 1:
            total = self.replace(total, take(rows * wide * _FP32))
        for _ in range(others - 1):
            give(*(take(filled * size) for size in (wide * self.element, heads * _FP32)))
        give(*padded)
        result, some = take(rows * wide * self.element), take(rows * heads * _FP32)
        give(some, sums, total)
        return result

    def joined(self, of: AttentionSpec, queries: int, others: int) -> int:
        """Run attention in `others` + 1 parts, summed in float32."""
        take, give = self.take, self.give
        rows = self.batch * queries
        width, heads = of.width, of.heads
        result, sums = take(rows * width * self.element), take(rows * heads * _FP32)
        total = take(rows * width * _FP32)
        for _ in range(others):
            give(result)
            result, some = take(rows * width * self.element), take(rows * heads * _FP32)
            sums = self.replace(sums, take(rows * heads * _FP32))
            give(some)
        give(result, sums)
        return self.replace(total, take(rows * width * self.element))

    def eager(self, of: AttentionSpec, rows: int, seen: int) -> tuple[int, int]:
        """Run eager attention: scores, scaled, masked, softmax in float32, cast back, times values."""
        take, give = self.take, self.give
        scores = of.heads * rows * seen
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
        self.at("")  # for few keys the two results are larger than the scores, and smaller than those of the MLP
        out = take(rows * of.width * self.element)
        result = take(rows * of.width * self.element)
        give(out)
        return result, weights
