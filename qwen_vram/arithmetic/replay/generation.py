"""Events of a generation, tensor by tensor, in the order of `transformers`.

`live_bytes` sums the live tensors of each moment from these events. The fragments of torch's allocator depend on the
order.

Source of the order: transformers 5.17 and 5.23 (modeling_qwen2.py, modeling_qwen3.py, cache_utils.py,
generation/utils.py); `replay.attention` and `replay.linear` have theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.arithmetic.kv_cache import layer_kv_bytes
from qwen_vram.arithmetic.replay.allocator import SMALL, CachingAllocator
from qwen_vram.arithmetic.replay.attention import Attention
from qwen_vram.arithmetic.replay.trace import LayerEvents, Recorder, known_layers
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import ALLOCATION_STEP
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

_INT64 = 8
_FP32 = 4
# The most decode steps of a growing cache that are replayed; of more steps, every nth.
_FOLLOWED = 1024


def replay_generation(
    allocator: CachingAllocator, architecture: Architecture, profile: Profile, workload: Workload
) -> None:
    """Run a process's first `generate` (or, for `logits="all"`, one plain forward) through `allocator`, in place.

    For one device's part of a model, tensors that are copied to it are allocated too. accelerate's hooks copy a step's
    hidden states before the part's first layer. For every layer they copy the common inputs of all layers again (mask,
    cosines and sines, position ids), and free them with the layer. The logits are copied to the first device, for
    `generate`.

    cuBLAS's workspace is allocated at the first product and stays; everything else is freed. Of the decode steps the
    first three and the last two are run, because only a length changes between them. A growing cache is followed
    through all steps (`grow`), because its length determines the blocks that it fits.
    """
    Generation(allocator, architecture, profile, workload).run()


class Generation(Attention):
    """One generation's events. Sizes are bytes."""

    known: dict[tuple[int, int], LayerEvents] | None = None

    def run(self) -> None:
        """Run all of it, in a process that has loaded the model."""
        if (self.profile.captures or self.paged) and self.workload.logits == "last":
            self.take_decode_step()
        inputs = self.inputs(self.workload.prompt_len)
        if self.workload.logits == "all":
            self.give(*self.step(self.workload.prompt_len, 0), *inputs)
            return
        logits = self.prefill()
        ids: list[int] = []
        for index in self.followed():
            length = self.workload.prompt_len + index
            if 3 <= index < self.workload.max_new_tokens - 2:
                self.grow(length - 1)
                continue
            if index:
                past, self.decoding = length - 1, True
                logits = self.captured_step(past) if self.profile.captures else self.step(1, past)
            ids = self.sample(logits, ids, length)
        self.give(*ids, *self.scores, *inputs)
        self.drop(*(block for layer in self.cache for block in layer))

    def followed(self) -> Iterator[int]:
        """Yield the new tokens that are replayed: the first three, the last two, and between them those of `grow`."""
        new = self.workload.max_new_tokens
        yield from range(min(3, new))
        if self.profile.cache == "dynamic":
            every = 1 + new // _FOLLOWED
            yield from range(-(-3 // every) * every, new - 2, every)
        yield from range(max(3, new - 2), new)

    def inputs(self, tokens: int) -> list[int]:
        """Allocate the inputs of a step, for `tokens` tokens of each sequence.

        These are the given ids and those that `generate` keeps, the attention mask and the position ids. Each sequence
        also has three flags, of at least one allocation step each. A plain forward pass has the ids only.
        Measured: with one tensor, 22 of the 26 plain forwards of tests/data/h200.jsonl are exact to the byte.
        """
        ids = self.batch * tokens * _INT64
        if self.workload.logits == "all":
            return self.of_generate(ids)
        return self.of_generate(*[ids] * 4, *[max(self.batch * _INT64, ALLOCATION_STEP)] * 3)

    def grow(self, past: int) -> None:
        """Replay a decode step's allocations of a growing cache, if its tensors are in the large pool.

        Each tensor is a little larger than the block that the one before it left. That block is used only if a neighbor
        is free. The pool therefore takes a new segment once in several steps, and a rest that a block cannot split off
        is used in later steps. A step's other tensors are in the small pool, except for those of many sequences.

        Recorded: NVIDIA H200, torch 2.11.0+cu130, transformers 5.17.0, 2026-11-26, Qwen2.5-0.5B with 4,096 tokens in
        chunks of 1,024. Its last two segments are taken with token 4,099 and 4,101, at the same requests as here.
        """
        for layer, held in zip(self.architecture.layers, self.cache, strict=True):
            size = self.batch * (past + 1) * layer.attention.key_value_width * self.element
            if size > SMALL:
                self.lengthen(held, size)

    def take_decode_step(self) -> None:
        """Allocate the cache and the decode step's tensors, which are made at load and stay."""
        from qwen_vram.arithmetic.decode_graph import step_sizes  # only for captured steps

        if self.paged:
            self.take_pages()
        elif self.profile.kv_format.is_quantized:
            self.take_for_all_layers()
        else:
            for layer, held in zip(self.architecture.layers, self.cache, strict=True):
                whole = layer_kv_bytes(layer, self.profile, tokens=self.workload.context_len, batch_size=self.batch)
                held.extend(self.keep(whole // 2) for _ in range(2))
        for size in step_sizes(self.architecture, self.profile, self.workload):
            self.take(size)

    def captured_step(self, past: int) -> list[int]:
        """Run what is not captured: streamed layers, and the quantization of tokens that become old.

        The step keeps its logits; other tensors are in its pool.
        """
        if self.profile.kv_format.is_quantized:
            width = sum(count * layer.attention.key_value_width for layer, count in self.architecture.kinds)
            self.quantize(width, self.profile.kv_format.key_group)
            self.give(self.take(self.batch * self.profile.kv_format.residual * width * self.element))
        if self.paged:
            from qwen_vram.arithmetic.batching import sampling_sizes

            self.give(*(self.take(size) for size in sampling_sizes(self.architecture)))
        if self.profile.streamed_layers:
            result = self.layer(0, 1, past)  # every other one leaves the same state
            self.give(result)
        return []

    def of_generate(self, *sizes: int) -> list[int]:
        """Allocate tensors of `generate` itself, which are on the model's first device."""
        return [self.take(size) for size in sizes] if self.architecture.starts else []

    def prefill(self) -> list[int]:
        """Run all chunks; if neither cache nor mask grows, the first three and the last two: the others are equal."""
        prompt = self.workload.prompt_len
        chunk = self.profile.prefill_chunk_size or prompt
        starts = list(range(0, prompt, chunk))
        if self.profile.cache != "dynamic" and not self.masked(2, chunk) and len(starts) > 5:
            starts = starts[:3] + starts[-2:]
        logits: list[int] = []
        if self.paged:
            from qwen_vram.arithmetic.batching import packed_tokens

            logits = self.step(packed_tokens(self.profile, self.workload), 0)
        for start in starts:
            following = self.step(min(chunk, prompt - start), start)
            self.give(*logits)
            logits = following
        return logits

    def sample(self, logits: list[int], ids: list[int], length: int) -> list[int]:
        """Sample the next token from the logits' float32 copy; return the ids with it."""
        if not self.architecture.starts:
            return []
        # The float32 copy stays during the next step, until that step makes its own (`_sample`).
        scores = self.take(self.batch * self.architecture.vocab_size * _FP32)
        self.at("")
        self.give(*self.scores)
        self.scores = [scores]
        token = self.take(self.batch * _INT64)
        longer = self.take(self.batch * (length + 1) * _INT64)
        self.give(*ids, token, *logits)
        return [longer]

    def step(self, queries: int, past: int) -> list[int]:
        """Run one forward pass; return the logits' block if `generate` reads it."""
        hidden, kept = self.begin(queries, past)
        is_held = bool(kept)  # the model holds the embeddings to the end
        remaining = self.architecture.num_hidden_layers
        left_at: dict[object, int] = {}  # by the state after a layer, the layers that were left then
        while remaining:
            number = self.architecture.num_hidden_layers - remaining
            again = (number > 0 or past > 0) and self.repeats(past)
            following = self.layer_again(number, queries, past) if again else self.layer(number, queries, past)
            if not is_held:
                self.give(hidden)
            hidden, is_held = following, False
            remaining -= 1
            state = self.state(hidden, past)
            if state is not None and state in left_at:
                # Some equal layers left the state as it was, and so would every group of that many layers.
                remaining %= left_at[state] - remaining
                left_at = {}
            elif state is not None:
                left_at[state] = remaining
        return self.end(hidden, kept, queries)

    def one_layer_step(self, number: int, queries: int, past: int) -> list[int]:
        """Run the same through one layer only, as if it were the last one and other layers had made its input."""
        hidden, kept = self.begin(queries, past)
        if kept:
            hidden = self.take(self.hidden_size(queries))  # the model holds the embeddings beside the layer's input
        following = self.layer(number, queries, past)
        self.give(hidden)
        return self.end(following, kept, queries)

    def resume(self, number: int, queries: int, past: int) -> tuple[int, int]:
        """Start again with `past` tokens in the cache, before a step through one layer only.

        It returns the bytes of the layer's cache before and after the step. They are 0 if the cache has its full length
        from the start, or if the workload has no cache.
        """
        self.warm = self.warm_lt = True
        self.scores = []
        self.cache[0] = self.cache[number] = [0, 0]
        if self.workload.logits == "all" or self.profile.cache != "dynamic":
            return 0, 0
        token = self.batch * self.architecture.layers[number].attention.key_value_width * self.element
        self.cache[number] = [past * token] * 2 if past else []
        return 2 * past * token, 2 * (past + queries) * token

    def begin(self, queries: int, past: int) -> tuple[int, list[int]]:
        """Allocate the embeddings, or the hidden states from the device before, and all blocks that stay to the end."""
        self.at("embedding" if self.architecture.starts else "")
        hidden = self.take(self.hidden_size(queries))
        self.at("")
        return hidden, [hidden, *self.shared(queries, past)] if self.architecture.starts else []

    def end(self, hidden: int, kept: list[int], queries: int) -> list[int]:
        """Run the last norm and the head; return the logits' block if `generate` reads it."""
        rows = self.batch * queries
        normed = [self.norm(rows, self.architecture.hidden_size, "last norm")] if self.architecture.ends else []
        self.give(hidden, *kept)
        return self.logits(rows if self.workload.logits == "all" else self.ends(), normed)

    def ends(self) -> int:
        """The most sequences of a step whose last token has logits: some prompts over pages are fed together."""
        if not self.paged or self.decoding:
            return self.batch
        from qwen_vram.arithmetic.batching import PACKED

        return min(self.workload.batch_size, PACKED)

    def hidden_size(self, queries: int) -> int:
        """Bytes of a step's hidden states."""
        return self.batch * queries * self.architecture.hidden_size * self.element

    def state(self, hidden: int, past: int) -> object:
        """The state that determines the later layers; `None` if they differ, or if each allocates its own cache."""
        return (hidden, self.consumer.state()) if self.repeats(past) else None

    def repeats(self, past: int) -> bool:
        """Tell if all layers of a step have the same events, but for what the first layer of the first step keeps."""
        own = self.profile.cache == "dynamic" or (self.profile.cache == "static" and not past)
        return len(self.architecture.kinds) == 1 and not (own and self.workload.logits == "last")

    def shared(self, queries: int, past: int) -> list[int]:
        """Allocate the tensors that the model makes once for all layers: cosines and sines, and the mask."""
        # The padding mask as booleans, and a flag that all of them are true.
        self.give(self.take(self.batch * (past + queries)), self.take(1))
        mask = self.mask(queries, past)
        return [*self.rotary_tables(self.batch * queries), *mask]

    def copies(self, queries: int, past: int) -> list[int]:
        """Allocate the same for one layer of a later device, with position ids."""
        rows = self.batch * queries
        mask = rows * self.seen(queries, past) * (self.element if self.profile.attention == "eager" else 1)
        tables = rows * self.architecture.rotary_dim * self.element
        sizes = [*([mask] if self.masked(queries, past) else []), tables, tables, rows * _INT64]
        return [self.take(size) for size in sizes]

    def logits(self, rows: int, normed: list[int]) -> list[int]:
        """Run the head's product, or its copy for `generate`; a tied head gets the last rows from the last device."""
        if not self.architecture.has_head:
            self.give(*normed)
            self.at("head" if self.architecture.starts else "")
            return self.of_generate(rows * self.architecture.vocab_size * self.element)
        self.at("head")
        normed = normed or [self.take(rows * self.architecture.hidden_size * self.element)]
        logits = self.product("lm_head", self.head, rows)
        self.give(*normed)
        if self.architecture.starts:
            return [logits]
        self.give(logits)
        return []

    def rotary_tables(self, rows: int) -> list[int]:
        """Make cosines and sines of the positions in float32."""
        take, give = self.take, self.give
        wide = rows * self.architecture.rotary_dim
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

    def layer(self, number: int, queries: int, past: int) -> int:
        """Run one decoder layer; its caller frees its input."""
        copies = [] if self.architecture.starts else self.copies(queries, past)
        fused, size = self.profile.kernels == "fused", self.hidden_size(queries)
        rows = self.batch * queries
        normed = self.norm(rows, self.architecture.hidden_size, "attention norm")
        attended, scores = self.attention(number, queries, past)
        self.give(normed)
        residual = attended if fused else self.replace(attended, self.take(size))
        normed = self.norm(rows, self.architecture.hidden_size, "mlp norm")
        product = self.gated_in_place(number, rows) if fused else self.gated(number, rows)
        self.at("mlp down_proj")
        down = self.linear(number, "down_proj", rows)
        self.give(product, normed)
        result = down if fused else self.replace(down, self.take(size))
        self.give(residual, *scores, *copies)
        return result

    def layer_again(self, number: int, queries: int, past: int) -> int:
        """Run a decoder layer that repeats the one before it: from its recorded events, several times as fast."""
        if not isinstance(self.consumer, CachingAllocator):
            return self.layer(number, queries, past)
        if self.known is None:
            self.known = known_layers(self.architecture, self.profile, self.workload)
        if (queries, past) not in self.known:
            recorder = Recorder()
            self.consume(recorder)
            self.known[queries, past] = recorder.recorded(lambda: self.layer(number, queries, past))
            self.consume(self.consumer)
        return self.consumer.run(self.known[queries, past])

    def gated(self, number: int, rows: int) -> int:
        """Run the MLP's `act(gate) * up`."""
        inner = rows * self.architecture.layers[number].inner_size * self.element
        self.at("mlp gate_proj")
        gate = self.linear(number, "gate_proj", rows)
        self.at("mlp up_proj")
        activated = self.replace(gate, self.take(inner))
        up = self.linear(number, "up_proj", rows)
        self.at("mlp product")
        product = self.take(inner)
        self.give(activated, up)
        return product

    def gated_in_place(self, number: int, rows: int) -> int:
        """Run the same in the memory of the gate."""
        self.at("mlp gate_proj")
        gate = self.linear(number, "gate_proj", rows)
        self.at("mlp up_proj")
        self.give(self.linear(number, "up_proj", rows))
        return gate
