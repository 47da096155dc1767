"""Live bytes beside the weights at each moment of a step, summed from the trace.

A step runs new tokens of each sequence through the layers, and equal layers make the same tensors. The trace is
therefore followed through one decoder layer of each kind, as if it were the last, and through both ends of the model.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

from qwen_vram.arithmetic.kv_cache import kv_cache_bytes
from qwen_vram.arithmetic.replay.generation import Generation
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

Phase = Literal["prefill", "decode"]


class Moment(NamedTuple):
    """Live bytes on the device at one moment beside weights and workspace."""

    phase: Phase
    name: str
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of cache and activations."""
        return self.kv_cache + self.activations


class LiveBytes:
    """Sums the live tensors, and keeps the largest sum of each moment. A block is its size in bytes.

    A layer's cache counts from the step's start with its length at the step's end. Bytes that it takes beyond that for
    a time are part of the moment.

    Attributes:
        moments: The most live bytes at each moment beside the cache, in the order of the moments.
    """

    def __init__(self) -> None:
        self.moments: dict[str, int] = {}
        self.begin(0, 0)

    def begin(self, before: int, after: int) -> None:
        """Begin without tensors; the cache of the traced layer is to grow from `before` to `after` bytes."""
        self._moment = ""
        self._live = self._most = 0
        # Bytes of the traced layer's cache, minus its bytes after the step.
        self._cache = before - after

    def take(self, nbytes: int, /) -> int:
        """Add a tensor."""
        self._live += nbytes
        if self._live > self._most:
            self._most = self._live
        return nbytes

    def give(self, /, *blocks: int) -> None:
        """Subtract tensors."""
        for nbytes in blocks:
            self._live -= nbytes

    def keep(self, nbytes: int, /) -> int:
        """Add a tensor of the cache."""
        self._cache += nbytes
        self._most = max(self._most, self._live + self._cache)
        return nbytes

    def drop(self, /, *blocks: int) -> None:
        """Subtract tensors of the cache."""
        self._cache -= sum(blocks)

    def at(self, moment: str, /) -> None:
        """Begin a moment with the live tensors."""
        if self._moment:
            self.moments[self._moment] = max(self._most, self.moments.get(self._moment, 0))
        self._moment = moment
        self._most = self._live

    def state(self) -> object:
        """Return the live bytes, which determine all later sums."""
        return self._live, self._cache


class _Step(NamedTuple):
    """`queries` new tokens of each sequence, after which `cached` tokens are in the cache."""

    phase: Phase
    queries: int
    cached: int


@lru_cache(maxsize=2048)
def moments(architecture: Architecture, profile: Profile, workload: Workload) -> tuple[Moment, ...]:
    """Return the moments that can have the peak, for the steps that can have it.

    Prefill: the last full chunk and the shorter one after it. Decode: the last step. If layers differ, each moment is
    that of the layer with the most bytes, as if it were the last one, when the cache is fullest. The bytes are exact up
    to the allocator's split rule (at most 1 MiB for each tensor, see `allocator`).
    """
    found: list[Moment] = []
    for step in _steps(profile, workload):
        cache, most = _followed(architecture, profile, workload, step)
        found.extend(Moment(step.phase, name, cache, nbytes) for name, nbytes in most.items())
    return tuple(found)


@lru_cache(maxsize=256)
def chunk_bytes(
    architecture: Architecture, profile: Profile, workload: Workload, *, queries: int, past: int
) -> tuple[int, int]:
    """Return the bytes of the cache, and the most live bytes beside it, in a prefill step of a workload.

    Args:
        queries: New tokens of each sequence.
        past: Tokens of each sequence in the cache before the step.
    """
    cache, most = _followed(architecture, profile, workload, _Step("prefill", queries, past + queries))
    return cache, max(most.values())


def _followed(
    architecture: Architecture, profile: Profile, workload: Workload, step: _Step
) -> tuple[int, dict[str, int]]:
    """Return the bytes of the cache after a step, and the most live bytes beside it at each moment."""
    live = LiveBytes()
    generation = Generation(live, architecture, profile, workload)
    generation.decoding = step.phase == "decode"
    past, cache = step.cached - step.queries, 0
    for number in {layer: number for number, layer in enumerate(architecture.layers)}.values():
        live.begin(*generation.resume(number, step.queries, past))
        generation.inputs(workload.prompt_len if step.phase == "prefill" else step.cached)
        logits = generation.one_layer_step(number, step.queries, past)
        if workload.logits == "last":
            generation.sample(logits, [], step.cached)
        live.at("")
    if workload.logits == "last":
        cache = kv_cache_bytes(
            architecture,
            profile,
            tokens=step.cached,
            batch_size=workload.batch_size,
            context_len=workload.context_len,
        )
    return cache, live.moments


def _steps(profile: Profile, workload: Workload) -> list[_Step]:
    prompt = workload.prompt_len
    if workload.logits == "all":
        return [_Step("prefill", prompt, prompt)]
    chunk = min(profile.prefill_chunk_size or prompt, prompt)
    full, rest = divmod(prompt, chunk)
    steps = [_Step("prefill", chunk, full * chunk)]
    if profile.cache == "paged":
        from qwen_vram.arithmetic.batching import packed_tokens

        together = packed_tokens(profile, workload)
        steps.append(_Step("prefill", together, together))
    if rest:
        steps.append(_Step("prefill", rest, prompt))
    if workload.max_new_tokens > 1 and not profile.captures:
        # A captured step has its own pool. The last token is never an input.
        steps.append(_Step("decode", 1, workload.context_len - 1))
    return steps
