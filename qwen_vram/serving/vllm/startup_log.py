"""Reader of vLLM's start-up log: the bytes and tokens that it states."""

from __future__ import annotations

import re
from typing import NamedTuple

_GIB = 2**30
# Texts of vLLM's log. Sources: vLLM 0.33.0, vllm/v1/core/kv_cache_utils.py:1148, vllm/v1/worker/gpu_worker.py:655 and
# 776, vllm/v1/worker/cpu_worker.py:219, vllm/v1/worker/gpu_model_runner.py:5089 and 6517. Older versions write the
# first two in lines of their own.
_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_SIZES = {
    "kv_cache": re.compile(
        r"Available KV cache memory: ([\d.]+) GiB|reserved ([\d.]+) GiB memory for KV Cache as specified by "
        r"kv_cache_memory_bytes|(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) GiB for KV cache"
    ),
    "weights": re.compile(r"Model loading took ([\d.]+) GiB memory"),
    "graphs": re.compile(r"Graph capturing finished in \d+ secs, took ([\d.]+) GiB"),
}
# The difference to the plan from which on a server warns.
_TOLERANCE = 0.05


class Reported(NamedTuple):
    """Figures of vLLM's log; `None` until it states them.

    Attributes:
        tokens: Tokens of the KV cache.
        model_len: Tokens of a sequence, to which `concurrency` refers.
        concurrency: Sequences of that length that the cache holds.
        sizes: Bytes by part, from texts with two decimals of a GiB. Of several workers, the smallest cache counts, and
            the largest of each other part.
    """

    tokens: int | None = None
    model_len: int | None = None
    concurrency: float | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def read(self, line: str) -> Reported:
        """Return these figures with those of a line of the log."""
        result = self
        if found := _TOKENS.search(line):
            result = result._replace(tokens=_number(found[1]))
        if found := _CONCURRENCY.search(line):
            result = result._replace(model_len=_number(found[1]), concurrency=float(found[2]))
        for part, pattern in _SIZES.items():
            if found := pattern.search(line):
                text = next(group for group in found.groups() if group is not None)
                result = result._with_size(part, round(float(text) * _GIB))
        return result

    def _with_size(self, part: str, size: int) -> Reported:
        sizes = dict(self.sizes)
        choose = min if part == "kv_cache" else max
        return self._replace(sizes=tuple({**sizes, part: choose(size, sizes.get(part, size))}.items()))


def compared(reported: Reported, tokens: int, concurrency: float) -> str:
    """Return a line with the figures of the log beside those of a plan; it begins with `warning` if they differ."""
    if reported.tokens is None or reported.concurrency is None:
        return f"vllm did not state its cache; planned: {tokens:,} tokens, {concurrency:.2f} sequences"
    text = (
        f"vllm holds {reported.tokens:,} tokens of keys and values, {reported.concurrency:.2f} sequences of "
        f"{reported.model_len:,}; planned: {tokens:,} tokens, {concurrency:.2f} sequences"
    )
    differs = abs(reported.concurrency - concurrency) > _TOLERANCE * concurrency
    return f"warning: {text}" if differs else text


def _number(text: str) -> int:
    return int(text.replace(",", ""))
