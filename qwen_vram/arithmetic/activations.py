"""Activations: the tensors that are live beside weights and KV cache in a forward pass.

A step feeds `q` tokens of each of `b` sequences, so T = b x q rows. In the frames of `transformers`' dense Qwen models
these tensors stay alive through a decoder layer, each T x hidden_size: the embeddings (held by the model), the layer's
input (held by its caller), the sum after attention, and the normed input of the MLP. Names follow the modules.

Of a model on several devices, the first holds the embeddings, and gets the logits for `generate`; a later one holds
copies of mask, cosines, sines and position ids for as long as a layer runs (accelerate 1.15, `AlignDevicesHook`).

Source of what is alive when: transformers 5.17 and 5.23, modeling_qwen2.py and modeling_qwen3.py, sdpa_attention.py;
torch 2.11, `softmax` and the memory-efficient attention kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from qwen_vram.arithmetic.attention import attention_parts, bias_columns, joined_rows
from qwen_vram.arithmetic.kv_cache import kv_cache_bytes, quantized_tokens
from qwen_vram.arithmetic.linear import linear_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import ALLOCATION_STEP
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

Phase = Literal["prefill", "decode"]

_INT64 = 8
_FP32 = 4
# input_ids as given and as generate keeps them, attention_mask and position_ids: one int64 each.
_ID_TENSORS = 4
# generate's per-sequence flags: three tensors of at most one allocation step each.
_FLAG_BYTES = 3 * ALLOCATION_STEP


class Moment(NamedTuple):
    """What is alive on the device at one moment beside weights and workspace, in bytes."""

    phase: Phase
    name: str
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """Cache and activations together."""
        return self.kv_cache + self.activations


class _Step(NamedTuple):
    """`queries` new tokens of each sequence, after which `cached` are in the cache."""

    phase: Phase
    queries: int
    cached: int


def moments(architecture: Architecture, profile: Profile, workload: Workload) -> Iterator[Moment]:
    """The moments at which the peak can fall, over the steps that can hold it.

    Prefill: the last full chunk and the shorter one after it. Decode: the last step. Each is the last layer's, when
    the cache is fullest. Exact up to the allocator's split rule (at most 1 MiB a tensor, see `allocator`).
    """
    for step in _steps(profile, workload):
        rows = _Rows(architecture, profile, workload, step)
        cache = 0
        if workload.logits == "last":
            cache = kv_cache_bytes(
                architecture,
                profile,
                tokens=step.cached,
                batch_size=workload.batch_size,
                context_len=workload.context_len,
            )
        for name, live in rows.moments():
            yield Moment(step.phase, name, cache, live)


def _steps(profile: Profile, workload: Workload) -> list[_Step]:
    prompt = workload.prompt_len
    if workload.logits == "all":
        return [_Step("prefill", prompt, prompt)]
    chunk = min(profile.prefill_chunk_size or prompt, prompt)
    full, rest = divmod(prompt, chunk)
    steps = [_Step("prefill", chunk, full * chunk)]
    if rest:
        steps.append(_Step("prefill", rest, prompt))
    if workload.max_new_tokens > 1 and not profile.captures:
        # A captured step has its own pool. The last token is never fed back.
        steps.append(_Step("decode", 1, workload.context_len - 1))
    return steps


class _Rows:
    """The live sets of one step; widths are bytes of one row of T."""

    def __init__(self, architecture: Architecture, profile: Profile, workload: Workload, step: _Step) -> None:
        self.architecture = architecture
        self.profile = profile
        self.workload = workload
        self.step = step
        self.rows = workload.batch_size * step.queries
        self.element = profile.element_bytes
        self.hidden = architecture.hidden_size * self.element
        self.embeddings = self.rows * self.hidden if architecture.starts else 0
        self.inner = architecture.intermediate_size * self.element
        self.queries = architecture.attention_width * self.element
        self.keys = architecture.key_value_width * self.element
        # Keys that attention sees: a static cache is attended to in its whole length.
        self.seen = workload.context_len if profile.attends_whole else step.cached
        self.fused = profile.kernels == "fused"
        self.linears = {weight.module: weight for weight in architecture.block if weight.is_linear}

    def moments(self) -> Iterator[tuple[str, int]]:
        """Name and live bytes of each moment of this step."""
        part, hidden = self.architecture, self.rows * self.hidden
        held = self._ids() + self._rotary() + self._mask() + self.embeddings
        if part.starts:
            yield "embedding", self._ids() + hidden
        # The float32 copy and its product, or the result alone.
        norm = hidden if self.fused else self.rows * part.hidden_size * 2 * _FP32
        yield "attention norm", held + hidden + norm
        yield from ((name, held + live) for name, live in self._attention())
        yield "mlp norm", held + 2 * hidden + norm + self._softmax()
        yield from ((name, held + live) for name, live in self._mlp())
        if part.ends:
            yield "last norm", (held if part.starts else 0) + hidden + norm
        if part.starts or part.has_head:
            yield "head", self._ids() + self._head()

    def _ids(self) -> int:
        if not self.architecture.starts:
            return 0
        tokens = self.workload.batch_size * self.workload.prompt_len
        if self.workload.logits == "all":
            return tokens * _INT64
        if self.step.phase == "decode":
            tokens = self.workload.batch_size * self.step.cached
        return tokens * _INT64 * _ID_TENSORS + _FLAG_BYTES

    def _rotary(self) -> int:
        """Cosines and sines, one row each of head_dim; position ids come along to a later device."""
        along = 0 if self.architecture.starts else self.rows * _INT64
        return 2 * self.rows * self.architecture.head_dim * self.element + along

    def _masked(self) -> bool:
        """Tell if attention gets an explicit mask: padding, an unfinished cache before the chunk, or a static cache."""
        if self.profile.attention in ("fused", "flash_attention_2"):
            masked = self.workload.padded or self.profile.attends_whole
            return masked and self.profile.attention == "fused"
        if self.profile.attention == "eager" or self.workload.padded:
            return True
        if self.profile.attends_whole:
            return self.step.cached > self.step.queries
        return self.step.queries > 1 and self.step.cached > self.step.queries

    def _mask_elements(self) -> int:
        return self.rows * self.seen if self._masked() else 0

    def _mask(self) -> int:
        """The mask that the model holds through all layers: booleans for sdpa, the model's dtype for eager."""
        return self._mask_elements() * (self.element if self.profile.attention == "eager" else 1)

    def _attention(self) -> Iterator[tuple[str, int]]:
        rows = self.rows
        # Alive all through beside the embeddings: the layer's input, its normed copy.
        held = 2 * rows * self.hidden
        for name in ("q_proj", "k_proj", "v_proj"):
            before = {"q_proj": 0, "k_proj": self.queries, "v_proj": self.queries + self.keys}[name]
            yield f"attention {name}", held + rows * before + self._linear(name)
        if "self_attn.q_norm.weight" in {weight.name for weight in self.architecture.block}:
            # The norm's float32 copy and product, its input, and the rounded result before it is scaled.
            norm = self.queries if self.fused else self.queries // self.element * 2 * _FP32
            yield "attention q_norm", held + rows * (self.queries + norm)
        # q, q x cos, the rotated half, and their product or sum; or q alone.
        yield "attention rotary", held + rows * ((1 if self.fused else 4) * self.queries + 2 * self.keys)
        yield (
            "attention cache",
            held + rows * (self.queries + 2 * self.keys) + self._concatenation() + self._quantizing(),
        )
        yield "attention kernel", held + self._kernel() + self._dequantized_cache()
        yield "attention o_proj", held + rows * self.queries + self._softmax() + self._linear("o_proj")

    def _kernel(self) -> int:
        """Queries, result, and what the attention function makes of keys, values and mask."""
        batch, seen = self.workload.batch_size, self.seen
        heads = self.architecture.num_attention_heads
        live = 2 * self.rows * self.queries
        grouped = heads > self.architecture.num_key_value_heads
        expanded = 2 * batch * seen * self.queries if grouped else 0
        if self.profile.attention == "eager":
            # Scores in the model's dtype, their float32 copy and the float32 softmax; without a cast, two of scores.
            scores = heads * self.rows * seen
            live += scores * (self.element + 2 * _FP32 if self.element != _FP32 else 2 * _FP32)
            return live - self.rows * self.queries + expanded
        log_sum_exp = heads * self.rows * _FP32
        if not self._masked() and self._joins() and self.fused:
            return self._joined_in_place()
        if not self._masked() and self._joins():
            return live + self.rows * self.queries // self.element * _FP32 + 3 * log_sum_exp
        if not self._masked():
            return live + log_sum_exp
        # The mask as an additive bias in the model's dtype; a mask also rules grouped heads out.
        if self.profile.attention == "fused":
            bias = self.rows * bias_columns(self.seen) * self.element
            return live + bias + (expanded if self.step.queries > 1 else 0)
        return live + log_sum_exp + expanded + self._mask_elements() * self.element

    def _joins(self) -> bool:
        """Tell if fused attention of this step is made in parts: where torch prefers cuDNN, but counted everywhere."""
        return self.profile.attention == "fused" and bool(self._parts())

    def _parts(self) -> tuple[int, ...]:
        queries = self.step.queries
        return attention_parts(queries, self.step.cached - queries, padded=self.fused)

    def _joined_in_place(self) -> int:
        """Queries, the sum in float32 where there are more than two parts, the next one, and two of log-sum-exps.

        An odd chunk's queries are also filled up to a power of two, and so are the results of all parts but the last.
        """
        batch = self.workload.batch_size
        filled = batch * joined_rows(self.step.queries, padded=True)
        sums = 2 * filled * self.architecture.num_attention_heads * _FP32
        padded = filled if filled > self.rows else 0
        before = (self.rows + padded + filled) * self.queries
        if len(self._parts()) == 1:
            return max(before, (2 * self.rows + filled) * self.queries) + sums
        return before + self.rows * self.queries // self.element * _FP32 + sums

    def _softmax(self) -> int:
        """What eager attention returns beside its result: the layer's caller keeps it to its end."""
        if self.profile.attention != "eager":
            return 0
        return self.architecture.num_attention_heads * self.rows * self.seen * self.element

    def _dequantized_cache(self) -> int:
        """One layer's keys and values in the model's dtype: made of a quantized cache, or held where there is none."""
        if self.workload.logits == "all":
            return 2 * self.rows * self.keys
        if self.profile.kv_cache != "bf16":
            return 2 * self.workload.batch_size * self.seen * self.keys
        return 0

    def _quantizing(self) -> int:
        """All keys and values in the model's dtype beside the appended ones, and float32 and codes of one of them."""
        if self.profile.kv_cache == "bf16" or self.workload.logits == "all":
            return 0
        past = self.step.cached - self.step.queries
        whole = 2 * self.workload.batch_size * self.step.cached * self.keys if past else 0
        tokens = quantized_tokens(self.step.cached) - quantized_tokens(past)
        return whole + self.workload.batch_size * tokens * self.architecture.key_value_width * (_FP32 + 1)

    def _concatenation(self) -> int:
        """One layer's old values, alive beside the new ones while a dynamic cache grows."""
        if self.profile.cache != "dynamic" or self.workload.logits == "all":
            return 0
        return self.workload.batch_size * (self.step.cached - self.step.queries) * self.keys

    def _mlp(self) -> Iterator[tuple[str, int]]:
        rows = self.rows
        held = 3 * rows * self.hidden + self._softmax()
        yield "mlp gate_proj", held + self._linear("gate_proj")
        yield "mlp up_proj", held + rows * self.inner + self._linear("up_proj")
        if not self.fused:
            yield "mlp product", held + 3 * rows * self.inner
        yield "mlp down_proj", held + rows * self.inner + self._linear("down_proj")

    def _linear(self, name: str) -> int:
        """A matrix product's result and what its format needs to make it."""
        return linear_bytes(self.linears[name], self.profile, self.rows, adapted=name in self.architecture.adapted)

    def _head(self) -> int:
        """The last hidden states, the logits, and generate's float32 copy of them."""
        part = self.architecture
        rows = self.rows if self.workload.logits == "all" else self.workload.batch_size
        logits = rows * part.vocab_size * self.element
        sampled = logits if self.workload.logits == "all" else logits + rows * part.vocab_size * _FP32
        if not part.has_head:
            return sampled
        hidden = (self.rows if part.ends else rows) * self.hidden
        made = hidden + linear_bytes(part.head, self.profile, rows, adapted="lm_head" in part.adapted)
        return max(made, sampled) if part.starts else made
