"""Options of `generate` that change the planned memory, or that no estimate counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache, StaticCache

from qwen_vram.errors import NotSupportedError
from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.kv_cache.host import HostCache
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache
from qwen_vram.spec.profile import Profile

_ELSEWHERE = "llm.model.generate() takes it, outside of what the plan promises"
_THROWN_AWAY = (
    f"it keeps a tensor for each new token, and generate(), chat() and stream() return text alone; {_ELSEWHERE}"
)
# Options that need memory which no estimate counts, with the reason of each refusal.
_UNCOUNTED = {
    "output_scores": _THROWN_AWAY,
    "output_logits": _THROWN_AWAY,
    "output_attentions": _THROWN_AWAY,
    "output_hidden_states": _THROWN_AWAY,
    "return_dict_in_generate": f"generate(), chat() and stream() return text alone; {_ELSEWHERE}",
    "assistant_model": f"the plan does not count a second model and its cache; {_ELSEWHERE}",
}
_CACHES = ("dynamic", "static")


class Asked:
    """The options of one call of `generate`, on top of a model's own `generation_config`.

    Args:
        model: A model whose `generation_config` has the values that no option sets.
        options: The caller's options.
    """

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        self._model, self._options = model, options

    def sequences(self) -> int:
        """Return the number of sequences for each prompt."""
        return max(int(self._value(name) or 1) for name in ("num_beams", "num_return_sequences"))

    def check(self) -> None:
        """Refuse options that need memory which no estimate counts.

        Raises:
            NotSupportedError: one of them is set.
        """
        for name, reason in _UNCOUNTED.items():
            value = self._passed(name)
            if value is not None and value is not False:
                shown = type(value).__name__ if name == "assistant_model" else repr(value)
                raise NotSupportedError(f"{name}={shown} is not supported here: {reason}", knob=name, value=value)
        if self._passed("use_cache") is False:
            raise NotSupportedError(
                "use_cache=False is not supported here: each step would run the whole context in one piece, which the "
                f"plan does not count; {_ELSEWHERE}",
                knob="use_cache",
                value=False,
            )
        scale = self._value("guidance_scale")
        if scale is not None and scale != 1:
            raise NotSupportedError(
                f"guidance_scale={scale!r} is not supported here: it runs the prompt a second time with a cache of its "
                f"own, which the plan does not count; {_ELSEWHERE}",
                knob="guidance_scale",
                value=scale,
            )

    def brings_cache(self) -> bool:
        """Tell if the options set the cache, so that the plan's cache is not created."""
        return self._passed("past_key_values") is not None or self._passed("cache_implementation") is not None

    def profile(self, planned: Profile) -> Profile:
        """Return the profile of this call: the planned one with the cache and chunk size of the options.

        Raises:
            NotSupportedError: no estimate counts a cache of this kind.
        """
        changes: dict[str, object] = {}
        chunk = self._passed("prefill_chunk_size")
        if chunk is not None:
            changes["prefill_chunk_size"] = chunk
        cache, name = self._passed("past_key_values"), self._passed("cache_implementation")
        if cache is not None:
            changes |= _knobs_of(cache)
        elif name is not None:
            if name not in _CACHES:
                raise NotSupportedError(
                    f"cache_implementation={name!r} is not supported here: the plan does not count it; use "
                    f"'dynamic' or 'static', or load with kv_cache='int8' or kv_device='host'. {_ELSEWHERE}",
                    knob="cache_implementation",
                    value=name,
                )
            changes |= {"cache": name, "kv_cache": "bf16", "kv_device": "device"}
        if planned.compiled and changes.keys() & {"cache"}:
            raise NotSupportedError(
                "a plan with compiled=True keeps the memory of its own cache, and counts no other one beside it; "
                f"use LoadedModel.new_cache(max_length=...), or no cache option. {_ELSEWHERE}",
                knob="past_key_values" if cache is not None else "cache_implementation",
                value=name or type(cache).__name__,
            )
        if "cache" in changes:  # captured steps run over the plan's own cache only
            changes["captured"] = False
        return planned.replace(**changes) if any(getattr(planned, k) != v for k, v in changes.items()) else planned

    def cache_length(self) -> int:
        """Return the tokens that the caller's own cache has memory for; 0 if it grows, or without such a cache."""
        cache = self._passed("past_key_values")
        if cache is None or isinstance(cache, DynamicCache):
            return 0
        return max(0, int(cache.get_max_length()))

    def _passed(self, name: str) -> Any:
        """Return the value of an option in this call."""
        if name in self._options:
            return self._options[name]
        return getattr(self._options.get("generation_config"), name, None)

    def _value(self, name: str) -> Any:
        """Return the value of an option, of this call or of the model's `generation_config`."""
        found = self._passed(name)
        return getattr(self._model.generation_config, name, None) if found is None else found


def _knobs_of(cache: object) -> dict[str, object]:
    """Return the knobs of a profile with this cache; empty for the cache of captured steps, which needs such a plan.

    Raises:
        NotSupportedError: no profile has a cache of this kind.
    """
    if isinstance(cache, GraphCache):
        return {}
    if isinstance(cache, HostCache):
        return {"cache": "preallocated", "kv_cache": "bf16", "kv_device": "host"}
    if isinstance(cache, PreallocatedCache):
        return {"cache": "preallocated", "kv_cache": cache.kv_cache, "kv_device": "device"}
    kind = {DynamicCache: "dynamic", StaticCache: "static"}.get(type(cache))
    if kind is not None and not getattr(cache, "offloading", False):
        return {"cache": kind, "kv_cache": "bf16", "kv_device": "device"}
    raise NotSupportedError(
        f"past_key_values is a {type(cache).__name__} that the plan does not count; use "
        f"LoadedModel.new_cache(max_length=...), a DynamicCache or a StaticCache. {_ELSEWHERE}",
        knob="past_key_values",
        value=type(cache).__name__,
    )
