"""Generations by a plan, one at a time: cache, limits and measured memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from transformers import Cache, StaticCache, StoppingCriteriaList

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import at_workload, split_of
from qwen_vram.checkpoints.running_plans import Publication
from qwen_vram.errors import WorkloadError
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.planning.planner import Plan
from qwen_vram.planning.search.search import Search
from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.generation.asked import Asked
from qwen_vram.runtime.generation.watched import watched
from qwen_vram.runtime.kv_cache.host import HostCache
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache, cache_bytes
from qwen_vram.runtime.measure import PeakMeter
from qwen_vram.runtime.memory.beside import Beside
from qwen_vram.runtime.memory.segments import Segments
from qwen_vram.runtime.publication import summed
from qwen_vram.runtime.scheduling.clock import Clock, Timed
from qwen_vram.runtime.scheduling.job import Job
from qwen_vram.runtime.scheduling.stopping import StopOfTurn
from qwen_vram.runtime.scheduling.turns import Turn, Turns
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# Options that keep only the tokens, because the other results are dropped here. They override generation_config.json.
_TOKENS_ALONE = {
    "return_dict_in_generate": True,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


class Generations:
    """Generations of a loaded model. The object holds no model, so reports remain after the model is freed.

    Args:
        loaded: Bytes that loading took, by part, on each device.
        before: Bytes that torch had allocated on each device before the model was loaded.

    Attributes:
        turns: The order of the generations; one of them runs at a time.
        measured: Bytes of loading and of the last generation, by part, on each device.
        timed: Times of the last generation; `None` before the first.
        count: The number of generations so far.
        publication: The file from which a monitor reads the plan and the measured bytes.
    """

    def __init__(
        self,
        plan: Plan,
        loaded: Mapping[torch.device, dict[str, int]],
        before: Mapping[torch.device, int],
        decoder: Decoder | None,
    ) -> None:
        self.plan = plan
        self.turns = Turns()
        self.decoder = decoder
        self.devices = tuple(loaded)
        self.device = self.devices[0]
        self.measured = {device: dict(parts) for device, parts in loaded.items()}
        self.timed: Timed | None = None
        self.count = 0
        self.publication: Publication | None = None
        self._beside = Beside(before)
        self._segments = Segments(plan, self.devices, self._beside)
        self._last: Workload | None = None

    def close(self) -> None:
        """Release decode steps and their memory; the measured figures stay."""
        self._segments.close()
        if self.decoder is not None:
            self.decoder.close()

    def prediction(self) -> Estimate:
        """Return the estimate for the last generation, or for the plan's workload before the first."""
        known = self.plan.estimate
        if self._last is None or known.architecture is None:
            return known
        return at_workload(known, self._last)

    def new_cache(self, *, max_length: int) -> Cache:
        """Return a cache as `LoadedModel.new_cache`."""
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise WorkloadError(
                f"max_length must be a positive whole number of tokens, got {max_length!r}",
                name="max_length",
                got=max_length,
            )
        if self.decoder is not None:
            return GraphCache(self.decoder, num_hidden_layers=self.decoder.layers, max_length=max_length)
        profile, architecture = self.plan.profile, self.plan.estimate.architecture
        assert architecture is not None
        layers, split = architecture.num_hidden_layers, tuple(split_of(self.plan.estimate).values())
        if profile.kv_device == "host":
            return HostCache(layers, max_length=max_length, split=split)
        return PreallocatedCache(layers, max_length=max_length, kv_cache=profile.kv_cache, split=split)

    def job(
        self,
        model: Callable[[], Any],
        inputs: Mapping[str, torch.Tensor],
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        ended: Callable[[], object] | None = None,
    ) -> Job[torch.Tensor]:
        """Return a generation that has not started; its result is prompts and answers, (batch, tokens).

        It calls `model.generate` with the plan's cache and with `options`.

        Args:
            model: Returns the model, or raises the error of a closed one. It is called again when the turn comes.
            ended: Called in the job's thread after its end.

        Raises:
            DoesNotFitError, WorkloadError, NotSupportedError: as for `LoadedModel.chat`, before anything is allocated.
        """
        asked = Asked(model(), options)
        asked.check()
        batch_size, prompt_len = inputs["input_ids"].shape
        workload = Workload(
            prompt_len=prompt_len,
            max_new_tokens=self.plan.workload.max_new_tokens if max_new_tokens is None else max_new_tokens,
            batch_size=batch_size * asked.sequences(),
            padded=not bool(inputs["attention_mask"].all()),
        )
        length = self._cache_length(workload)
        self._check_asked(asked, workload)
        own_cache = asked.brings_cache()
        promised = self._is_promised(asked, workload)
        work = partial(self._run, model, inputs, workload, None if own_cache else length, promised, options)
        return Job(self.turns, work, self.device, ended)

    @torch.inference_mode()
    def _run(
        self,
        model: Callable[[], Any],
        inputs: Mapping[str, torch.Tensor],
        workload: Workload,
        length: int | None,
        promised: bool,
        options: Mapping[str, Any],
        turn: Turn,
    ) -> torch.Tensor:
        """Run the work of a job; `length` is as for `_cache_settings`, or `None` if the options bring a cache."""
        with self._segments.within((workload, length), promised=promised):
            if length is None and self.decoder is not None:
                self.decoder.drop_buffers()
            return self._generate(model(), inputs, workload, length, options, turn)

    def _generate(
        self,
        generator: Any,
        inputs: Mapping[str, torch.Tensor],
        workload: Workload,
        length: int | None,
        options: Mapping[str, Any],
        turn: Turn,
    ) -> torch.Tensor:
        meters = [PeakMeter(device) for device in self.devices]
        for meter in meters:
            meter.start()
        on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        clock = Clock(self.device)
        stop = StopOfTurn(turn, workload.prompt_len, clock)
        settings = {
            "max_new_tokens": workload.max_new_tokens,
            # The plan's cache replaces the file's. A step that transformers compiles would take additional memory.
            "cache_implementation": None,
            "disable_compile": True,
            **({} if length is None else self._cache_settings(generator, workload, length)),
            **options,
            "stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop]),
            **_TOKENS_ALONE,
        }
        cache = settings.get("past_key_values")
        try:
            with watched(generator, settings) as arguments, stop.before_chunks(generator):
                clock.begin()
                output = generator.generate(**on_device, **arguments)
                self.timed = clock.end(workload, output.sequences.shape[1] - workload.prompt_len)
            self._note(workload, output, meters)
        finally:
            if isinstance(cache, GraphCache) and "past_key_values" not in options:
                cache.release()  # otherwise references to it would keep the memory from the next generation
            if self.decoder is not None:
                self.decoder.drop_larger_buffers()
        if stop.obeyed:
            turn.check(output.sequences.shape[1] - workload.prompt_len)
        return cast("torch.Tensor", output.sequences)

    def _cache_settings(self, model: Any, workload: Workload, length: int) -> dict[str, Any]:
        """Return the plan's cache as options of `generate`; a preallocated cache holds `length` tokens."""
        kind = self.plan.profile.cache
        if self.decoder is not None:
            self.decoder.prepare(workload.batch_size, workload.context_len)
            return {"past_key_values": self.new_cache(max_length=workload.context_len)}
        if kind == "preallocated":
            return {"past_key_values": self.new_cache(max_length=length)}
        if kind == "static":
            # `generate` would keep a static cache that it creates, and would compile for it unless told otherwise.
            cache = StaticCache(config=model.config, max_cache_len=workload.context_len)
            return {"past_key_values": cache, "disable_compile": True}
        return {"cache_implementation": "dynamic"}

    def _cache_length(self, workload: Workload) -> int:
        """Return the length of a preallocated cache that fits: the planned one, so that its block is used again.

        A block for each length would leave longer and longer blocks reserved beside the promised memory. The length is
        that of the workload if it is longer than planned, or if unplanned padding leaves no memory for more.

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
        """Tell if the plan's own workload has at least the sequences and tokens of this one."""
        planned = self.plan.workload
        return (
            workload.batch_size <= planned.batch_size
            and workload.prompt_len <= planned.prompt_len
            and workload.context_len <= planned.context_len
        )

    def _is_promised(self, asked: Asked, workload: Workload) -> bool:
        """Tell if the plan's estimate covers the generation; any other one has been compared with the budget."""
        planned = self.plan
        padding = planned.workload.padded or not workload.padded
        same = not asked.brings_cache() and asked.profile(planned.profile) == planned.profile
        return padding and same and self._is_covered(workload)

    def _check_room(self, workload: Workload) -> None:
        """Refuse a workload that does not fit the budget."""
        self._search(self.plan.profile, workload, session=False).run("quality")

    def _check_asked(self, asked: Asked, workload: Workload) -> None:
        """Compare the cache and the chunk size of the options with the budget.

        Raises:
            DoesNotFitError: they do not fit.
            NotSupportedError: no estimate counts them.
        """
        profile = asked.profile(self.plan.profile)
        held = asked.cache_length() - workload.prompt_len
        if held > workload.max_new_tokens:
            workload = replace(workload, max_new_tokens=held)
        if profile == self.plan.profile:
            if not self._is_covered(workload):
                self._check_room(workload)
            return
        self._search(profile, workload, session=True).run("quality")

    def _search(self, profile: Profile, workload: Workload, *, session: bool) -> Search:
        """Return the search that compares `workload` with the plan's budget and split."""
        known, budget = self.plan.estimate, self.plan.budget
        assert known.architecture is not None
        return Search(
            known.model,
            known.architecture,
            workload,
            budget,
            profile,
            {},
            split_of(known),
            machine=known.machine,
            session=session,
        )

    def _note(self, workload: Workload, output: Any, meters: list[PeakMeter]) -> None:
        """Keep the measured memory of the generation, under the names of the estimate's parts."""
        if self.plan.profile.cache == "dynamic":
            # A growing cache holds the generated tokens, which an early end makes fewer.
            made = output.sequences.shape[1] - workload.prompt_len
            workload = replace(workload, max_new_tokens=made)
        cache = output.past_key_values
        # The whole cache is allocated and counted, not only the filled part.
        if isinstance(cache, GraphCache):
            workload = cache.as_held(workload)
        elif isinstance(cache, (PreallocatedCache, HostCache)):
            # The last token is never stored, so a caller's cache may be one token shorter than the workload.
            new = max(1, cache.layers[0].max_length - workload.prompt_len)
            workload = replace(workload, max_new_tokens=new)
        measured = {device: dict(parts) for device, parts in self.measured.items()}
        for meter in meters:
            held = cache_bytes(cache, meter.device)
            run = {"kv_cache": held, **meter.stop()}
            if "peak_allocated" in run:
                beside = self._beside.nbytes(meter.device)
                run["peak_allocated"] -= beside
                run["peak_reserved"] -= beside
                weights = self.measured[meter.device]["weights"]
                # Memory that stays allocated beside the weights: workspace, rounding, buffers.
                answer = output.sequences.nbytes if meter.device == self.device else 0
                run["workspace"] = max(0, meter.allocated() - beside - held - answer - weights)
                run["activations"] = run["peak_allocated"] - weights - held - run["workspace"]
            measured[meter.device].update(run)
        self._last, self.measured = workload, measured  # in one assignment, because another thread may ask for a report
        self.count += 1
        if self.publication is not None:
            self.publication.update(measured=summed(self.plan, measured), generations=self.count)
