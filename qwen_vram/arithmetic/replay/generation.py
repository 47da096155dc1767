"""Allocations of a generation in their order, for the replay.

`activations` says what is alive at each moment and gives the allocated peak at once; here the same tensors come and go
in the order in which `transformers` makes them, which decides how torch's allocator fragments. The two are written
apart, and a test holds one against the other.

Source of the order: transformers 5.17 and 5.23 (modeling_qwen2.py, modeling_qwen3.py, cache_utils.py,
generation/utils.py); `replay.attention` and `replay.linear` have theirs.
"""

from __future__ import annotations

from dataclasses import replace

from qwen_vram.arithmetic.decode_graph import step_sizes
from qwen_vram.arithmetic.kv_cache import layer_kv_bytes
from qwen_vram.arithmetic.replay.allocator import SMALL, CachingAllocator
from qwen_vram.arithmetic.replay.attention import Attention
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

_INT64 = 8
_FP32 = 4
# Of a growing cache's decode steps at most so many are followed, every nth of more.
_FOLLOWED = 1024


def replay_generation(
    allocator: CachingAllocator, architecture: Architecture, profile: Profile, workload: Workload
) -> None:
    """Run a process's first `generate` (or, for `logits="all"`, one plain forward) through `allocator`, in place.

    For one device's part of a model, what crosses to it is taken too: accelerate's hooks bring a step's hidden states
    before the part's first layer, and for every layer anew what the model hands to all of them (mask, cosines and
    sines, position ids), which goes with the layer. The logits go back to the first device, where `generate` is.

    cuBLAS's workspace is taken on the way and stays; everything else is given back.
    Of the decode steps the first three and the last two are run: between them nothing changes but a length. A cache
    that grows is followed through them all (`grow`), for its length decides what fits where the old one was.
    """
    _Generation(allocator, architecture, profile, workload).run()


def pool_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """What the pool of a captured decode step reserves: its temporary tensors, had it not been compiled."""
    if not profile.captures or workload.logits == "all":
        return 0
    allocator = CachingAllocator()
    generation = _Generation(allocator, architecture, profile, replace(workload, padded=False))
    generation.warm = generation.warm_lt = True
    for held in generation.cache:
        held.extend((0, 0))  # they are there already
    generation.step(1, workload.context_len - 1)
    return allocator.peak_reserved


class _Generation(Attention):
    """One generation's allocations. Sizes are bytes; T is batch x new tokens of a step."""

    def run(self) -> None:
        if self.profile.captures and self.workload.logits == "last":
            self.take_decode_step()
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
                if index % (1 + self.workload.max_new_tokens // _FOLLOWED) == 0:
                    self.grow(length)
                length += 1
                continue
            if index:
                # A captured step keeps its logits, and all else of it is in its own pool.
                logits = [] if self.profile.captures else self.step(1, length)
                length += 1
            ids = self.sample(logits, ids, length)
        self.give(*ids, *self.scores, *flags, *positions, *inputs, *(block for layer in self.cache for block in layer))

    def grow(self, past: int) -> None:
        """What a decode step does to a cache that grows, where its tensors come from the large pool.

        Each is then a little larger than the block that the one before left, which therefore serves only where a
        neighbour is free: the pool takes a new segment once in some steps, and what a block does not need and cannot
        split off serves later ones. A step's other tensors are in the small pool, but for those of many sequences.
        Recorded: NVIDIA H200, torch 2.11.0+cu130, transformers 5.17.0, 2026-11-26, Qwen2.5-0.5B with 4,096 tokens in
        chunks of 1,024: its last two segments come with token 4,099 and 4,101, at the same requests as here.
        """
        size = self.batch * (past + 1) * self.architecture.key_value_width * self.element
        if self.profile.cache == "dynamic" and size > SMALL:
            for held in self.cache:
                self.lengthen(held, size)

    def take_decode_step(self) -> None:
        """The cache and the decode step, which are made at load and stay."""
        context = self.workload.context_len
        whole = layer_kv_bytes(self.architecture, self.profile, tokens=context, batch_size=self.batch)
        for held in self.cache:
            held.extend(self.take(whole // 2) for _ in range(2))
        for size in step_sizes(self.architecture, self.profile, self.workload):
            self.take(size)

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
        # The float32 copy stays through the next step, until that has made its own (`_sample`).
        scores = self.take(self.batch * self.architecture.vocab_size * _FP32)
        self.give(*self.scores)
        self.scores = [scores]
        token = self.take(self.batch * _INT64)
        longer = self.take(self.batch * (length + 1) * _INT64)
        self.give(*ids, token, *logits)
        return [longer]

    def step(self, queries: int, past: int) -> list[int]:
        """One forward; returns the logits' block where `generate` reads it."""
        take, give = self.take, self.give
        rows = self.batch * queries
        hidden_size = rows * self.architecture.hidden_size * self.element
        hidden = take(hidden_size)  # the embeddings, or what comes from the device before
        kept = [hidden, *self.shared(rows, queries, past)] if self.architecture.starts else []
        remaining = self.architecture.num_hidden_layers
        states: list[object] = [None, None]
        while remaining:
            layer = self.architecture.num_hidden_layers - remaining
            copies = [] if self.architecture.starts else self.copies(rows, queries, past)
            following = self.layer(layer, hidden_size, queries, past)
            give(*copies)
            if hidden not in kept:
                give(hidden)
            hidden = following
            remaining -= 1
            states.append(self.state(hidden, past))
            if states[-1] is not None and states[-1] == states[-3]:
                remaining %= 2  # two layers after which all is as before them: so would every two be
        normed = [self.norm(rows, self.architecture.hidden_size)] if self.architecture.ends else []
        give(hidden, *kept)
        return self.logits(rows if self.workload.logits == "all" else self.batch, normed)

    def state(self, hidden: int, past: int) -> object:
        """What decides all that the layers to come do; `None` where each takes a cache of its own."""
        own = self.profile.cache == "dynamic" or (self.profile.cache == "static" and not past)
        return None if own and self.workload.logits == "last" else (hidden, self.allocator.state())

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

    def layer(self, layer: int, hidden_size: int, queries: int, past: int) -> int:
        take, give = self.take, self.give
        rows = self.batch * queries
        normed = self.norm(rows, self.architecture.hidden_size)
        attended, scores = self.attention(layer, queries, past)
        give(normed)
        fused = self.profile.kernels == "fused"
        residual = attended if fused else self.replace(attended, take(hidden_size))
        normed = self.norm(rows, self.architecture.hidden_size)
        product = self.gated_in_place(rows) if fused else self.gated(rows)
        down = self.linear("down_proj", rows)
        give(product, normed)
        result = down if fused else self.replace(down, take(hidden_size))
        give(residual, *scores)
        return result

    def gated(self, rows: int) -> int:
        """The MLP's `act(gate) * up`."""
        inner = rows * self.architecture.intermediate_size * self.element
        gate = self.linear("gate_proj", rows)
        activated = self.replace(gate, self.take(inner))
        up = self.linear("up_proj", rows)
        product = self.take(inner)
        self.give(activated, up)
        return product

    def gated_in_place(self, rows: int) -> int:
        """The same in the memory of the gate."""
        gate = self.linear("gate_proj", rows)
        self.give(self.linear("up_proj", rows))
        return gate
