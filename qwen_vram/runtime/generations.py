"""Generating by a plan: its cache, the room that a workload has, and what each run took."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import Cache, StaticCache

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.split import at_workload, split_of
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.errors import DoesNotFitError, WorkloadError
from qwen_vram.planning.planner import Plan
from qwen_vram.planning.search import Search
from qwen_vram.runtime.decode_room import RoomCache
from qwen_vram.runtime.decoder import Decoder
from qwen_vram.runtime.host_cache import HostCache
from qwen_vram.runtime.kv_cache import PreallocatedCache, cache_bytes
from qwen_vram.runtime.measure import PeakMeter
from qwen_vram.runtime.sampling import Settings
from qwen_vram.runtime.watched import watched


class Generations:
    """Runs a loaded model's generations. Holds no model, so that a closed one is given back while reports stay.

    Attributes:
        measured: What loading took, and the last generation where there was one, on each device.
    """

    def __init__(self, plan: Plan, loaded: Mapping[torch.device, dict[str, int]], decoder: Decoder | None) -> None:
        self.plan = plan
        self.decoder = decoder
        self.devices = tuple(loaded)
        self.device = self.devices[0]
        self.measured = {device: dict(parts) for device, parts in loaded.items()}
        self._last: Workload | None = None

    def prediction(self) -> Estimate:
        """What was promised for the last generation, or for the plan's workload before the first."""
        known = self.plan.estimate
        if self._last is None or known.architecture is None:
            return known
        return at_workload(known, self._last)

    def new_cache(self, *, max_length: int) -> Cache:
        """As `LoadedModel.new_cache`."""
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise WorkloadError(
                f"max_length must be a positive whole number of tokens, got {max_length!r}",
                name="max_length",
                got=max_length,
            )
        if self.decoder is not None:
            return RoomCache(self.decoder, max_length=max_length)
        profile, architecture = self.plan.profile, self.plan.estimate.architecture
        assert architecture is not None
        layers, split = architecture.num_hidden_layers, tuple(split_of(self.plan.estimate).values())
        if profile.kv_device == "host":
            return HostCache(layers, max_length=max_length, split=split)
        return PreallocatedCache(layers, max_length=max_length, kv_cache=profile.kv_cache, split=split)

    @torch.inference_mode()
    def run(
        self, model: Any, inputs: Mapping[str, torch.Tensor], max_new_tokens: int | None, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Prompts and what followed, (batch, tokens): `model.generate` with the plan's cache, and `options` on top.

        Raises:
            DoesNotFitError, WorkloadError: as for `LoadedModel.chat`, before anything is allocated.
            NotFiniteError: the logits are NaN or infinite.
        """
        batch_size, prompt_len = inputs["input_ids"].shape
        new = self.plan.workload.max_new_tokens if max_new_tokens is None else max_new_tokens
        workload = Workload(
            prompt_len=prompt_len,
            max_new_tokens=new,
            batch_size=batch_size * Settings(options, model.generation_config).sequences,
            padded=not bool(inputs["attention_mask"].all()),
        )
        length = self._cache_length(workload)
        meters = [PeakMeter(device) for device in self.devices]
        for meter in meters:
            meter.start()
        on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        settings = {"max_new_tokens": new, **self._cache_settings(model, workload, length), **options}
        cache = settings.get("past_key_values")
        try:
            with watched(model, settings) as arguments:
                output = model.generate(**on_device, **{**arguments, "return_dict_in_generate": True})
            self._note(workload, output, meters)
        finally:
            if isinstance(cache, RoomCache) and "past_key_values" not in options:
                cache.release()  # or an error's traceback would keep the memory from the next generation
        return cast("torch.Tensor", output.sequences)

    def _cache_settings(self, model: Any, workload: Workload, length: int) -> dict[str, Any]:
        """The plan's cache as `generate` takes it; a preallocated one has room for `length` tokens."""
        kind = self.plan.profile.cache
        if self.decoder is not None:
            self.decoder.prepare(workload.batch_size, workload.context_len)
            return {"past_key_values": self.new_cache(max_length=workload.context_len)}
        if kind == "preallocated":
            return {"past_key_values": self.new_cache(max_length=length)}
        if kind == "static":
            # Our own, for `generate` keeps the one that it makes; and it compiles for one unless it is told not to.
            cache = StaticCache(config=model.config, max_cache_len=workload.context_len)
            return {"past_key_values": cache, "disable_compile": True}
        return {"cache_implementation": "dynamic"}

    def _cache_length(self, workload: Workload) -> int:
        """Tokens of a preallocated cache, which fits: those planned, so that as many sequences take one block again.

        A block for each length would leave ever longer ones behind, reserved beside what was promised. It is as long as
        the workload where that is longer than planned, or where padding, which was not, leaves no room for more.

        Raises:
            DoesNotFitError, WorkloadError: as for `LoadedModel.chat`.
        """
        planned, architecture = self.plan.workload, self.plan.estimate.architecture
        assert architecture is not None
        workload.check(architecture)
        if self._is_covered(workload):
            if planned.padded or not workload.padded:
                return planned.context_len
            with suppress(DoesNotFitError):
                self._check_room(replace(workload, max_new_tokens=planned.context_len - workload.prompt_len))
                return planned.context_len
        self._check_room(workload)
        return workload.context_len

    def _is_covered(self, workload: Workload) -> bool:
        """Whether the plan's own workload has at least as many sequences and tokens."""
        planned = self.plan.workload
        return (
            workload.batch_size <= planned.batch_size
            and workload.prompt_len <= planned.prompt_len
            and workload.context_len <= planned.context_len
        )

    def _check_room(self, workload: Workload) -> None:
        """Refuse what does not fit the budget."""
        known = self.plan.estimate
        assert known.architecture is not None
        split = split_of(known)
        Search(known.model, known.architecture, workload, self.plan.budget, known.profile, {}, split).run("quality")

    def _note(self, workload: Workload, output: Any, meters: list[PeakMeter]) -> None:
        """Keep what the generation took, under the names of the estimate's parts."""
        if self.plan.profile.cache == "dynamic":
            # A growing cache holds what was really made, which an early end keeps short.
            made = output.sequences.shape[1] - workload.prompt_len
            workload = replace(workload, max_new_tokens=made)
        cache = output.past_key_values
        # What is held, and counted, is the whole room.
        if isinstance(cache, RoomCache):
            workload = cache.as_held(workload)
        elif isinstance(cache, (PreallocatedCache, HostCache)):
            # The last token is never stored: a caller's cache may be one shorter than the workload.
            new = max(1, cache.layers[0].max_length - workload.prompt_len)
            workload = replace(workload, max_new_tokens=new)
        self._last = workload
        for meter in meters:
            held = cache_bytes(cache, meter.device)
            run = {"kv_cache": held, **meter.stop()}
            if "peak_allocated" in run:
                weights = self.measured[meter.device]["weights"]
                # What stays allocated at rest beside the weights: workspace, rounding, buffers.
                answer = output.sequences.nbytes if meter.device == self.device else 0
                run["workspace"] = max(0, meter.allocated() - held - answer - weights)
                run["activations"] = run["peak_allocated"] - weights - held - run["workspace"]
            self.measured[meter.device].update(run)
