"""Generations by a plan, one at a time: cache, limits and measured memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from transformers import Cache, StoppingCriteriaList

from qwen_vram.arithmetic.continued import largest_piece
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import at_workload
from qwen_vram.checkpoints.running_plans import Publication
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.generation.asked import Asked
from qwen_vram.runtime.generation.caches import cache_settings, new_cache
from qwen_vram.runtime.generation.continued_prefill import continued_prefill
from qwen_vram.runtime.generation.kept_cache import Claim, KeptCache
from qwen_vram.runtime.generation.limits import Limits
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
from qwen_vram.spec.workload import Workload

# Options that keep only the tokens, because the other results are dropped here. They override generation_config.json.
_TOKENS_ALONE = {
    "return_dict_in_generate": True,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


class _Request(NamedTuple):
    """One checked call of `model.generate`.

    Attributes:
        length: The number of tokens that a preallocated cache holds; `None` if the options bring a cache.
        promised: The plan's estimate covers it.
        claim: The conversation whose turn it is.
    """

    inputs: Mapping[str, torch.Tensor]
    workload: Workload
    length: int | None
    promised: bool
    options: Mapping[str, Any]
    claim: Claim | None


class Generations:
    """Generations of a loaded model. The object holds no model, so reports remain after the model is freed.

    Args:
        loaded: Bytes that loading took, by part, on each device.
        before: Bytes that torch had allocated on each device before the model was loaded.

    Attributes:
        turns: The order of the generations; one of them runs at a time.
        limits: The comparison of generations with the plan and its budget.
        kept: The cache of a conversation between its turns, which any other generation frees.
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
        self.limits = Limits(plan)
        self.decoder = decoder
        self.devices = tuple(loaded)
        self.device = self.devices[0]
        self.measured = {device: dict(parts) for device, parts in loaded.items()}
        self.timed: Timed | None = None
        self.count = 0
        self.publication: Publication | None = None
        self._beside = Beside(before)
        self.kept = KeptCache(self._beside)
        self._segments = Segments(plan, self.devices, self._beside)
        self._last: Workload | None = None

    def close(self) -> None:
        """Release decode steps, the kept cache and their memory; the measured figures stay."""
        self.kept.drop()
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
        """Return a cache as `LoadedModel.new_cache`; it takes the place of a kept one."""
        made = new_cache(self.plan, self.decoder, max_length=max_length)
        self.kept.drop()
        return made

    def job(
        self,
        model: Callable[[], Any],
        inputs: Mapping[str, torch.Tensor],
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        ended: Callable[[], object] | None = None,
        claim: Claim | None = None,
        deadline: float | None = None,
    ) -> Job[torch.Tensor]:
        """Return a generation that has not started; its result is prompts and answers, (batch, tokens).

        It calls `model.generate` with the plan's cache and with `options`.

        Args:
            model: Returns the model, or raises the error of a closed one. It is called again when the turn comes.
            ended: Called in the job's thread after its end.
            deadline: The value of `time.monotonic()` from which the generation is stopped.
            claim: The conversation whose turn it is: it continues from its kept cache, and keeps the cache after it.

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
        length = self.limits.cache_length(workload, longest=claim is not None)
        self.limits.check_asked(asked, workload)
        brings = asked.brings_cache()
        promised = self.limits.is_promised(asked, workload)
        request = _Request(inputs, workload, None if brings else length, promised, options, claim)
        return Job(self.turns, partial(self._run, model, request), self.device, ended, deadline)

    @torch.inference_mode()
    def _run(self, model: Callable[[], Any], request: _Request, turn: Turn) -> torch.Tensor:
        self.kept.drop(unless=None if request.claim is None else request.claim.owner)
        with self._segments.within((request.workload, request.length), promised=request.promised):
            if request.length is None and self.decoder is not None:
                self.decoder.drop_buffers()
            return self._generate(model(), request, turn)

    def _generate(self, generator: Any, request: _Request, turn: Turn) -> torch.Tensor:
        inputs, workload, _, _, options, claim = request
        meters = [PeakMeter(device) for device in self.devices]
        for meter in meters:
            meter.start()
        on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        clock = Clock(self.device)
        stop = StopOfTurn(turn, workload.prompt_len, clock)
        continued = self._continued(generator, request)
        settings = {
            "max_new_tokens": workload.max_new_tokens,
            # The plan's cache replaces the file's. A step that transformers compiles would take additional memory.
            "cache_implementation": None,
            "disable_compile": True,
            **({} if request.length is None or continued else self._cache_settings(generator, request)),
            **options,
            **continued,
            "stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop]),
            **_TOKENS_ALONE,
        }
        cache = settings.get("past_key_values")
        try:
            with (
                self.kept.used(claim, cache, inputs["input_ids"], lasting=self._keeps(request)) as answered,
                watched(generator, settings) as arguments,
                stop.before_chunks(generator),
            ):
                clock.begin()
                with continued_prefill(generator, on_device, arguments) as rest:
                    output = generator.generate(**on_device, **rest)
                made = output.sequences.shape[1] - workload.prompt_len
                # No predicted time is that of a prompt whose first tokens are in the cache.
                self.timed = clock.end(workload, made) if not continued else None
                answered(output.sequences)
            self._note(workload, output, meters)
        finally:
            if isinstance(cache, GraphCache) and "past_key_values" not in options and not self.kept.holds(cache):
                cache.release()  # otherwise references to it would keep the memory from the next generation
            if self.decoder is not None:
                self.decoder.drop_larger_buffers()
        if stop.obeyed:
            turn.check(made)
        return cast("torch.Tensor", output.sequences)

    def _keeps(self, request: _Request) -> bool:
        """Tell if the cache stays after a turn of a conversation: no plan counts one that is longer than planned."""
        return request.length is not None and request.length <= self.plan.workload.context_len

    def _cache_settings(self, model: Any, request: _Request) -> dict[str, Any]:
        assert request.length is not None
        kept = request.claim is not None and self._keeps(request)
        return cache_settings(self.plan, self.decoder, model, request.workload, request.length, kept=kept)

    def _continued(self, model: Any, request: _Request) -> dict[str, Any]:
        """Return the kept cache as options of `generate`; empty if the whole prompt is fed."""
        workload, claim = request.workload, request.claim
        if claim is None:
            return {}
        cache = self.kept.take(claim.owner, request.inputs["input_ids"], context_len=workload.context_len)
        if cache is None:
            return {}
        held = int(cache.get_seq_length())
        profile = Asked(model, request.options).profile(self.plan.profile)
        covered = self.plan.workload if self.limits.is_covered(workload) else workload
        piece = largest_piece(self.plan.estimate, profile, workload, held=held, covered=covered)
        if not piece:
            self.kept.lose(cache)
            return {}
        return {"past_key_values": cache, "prefill_chunk_size": piece}

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
        self._keep(workload, meters, lambda device: cache_bytes(cache, device), answer=output.sequences.nbytes)

    def _keep(
        self, workload: Workload, meters: list[PeakMeter], held: Callable[[torch.device], int], *, answer: int = 0
    ) -> None:
        """Keep measured memory.

        Args:
            held: Returns the bytes of keys and values on a device.
            answer: Bytes of the tokens on the first device.
        """
        measured = {device: dict(parts) for device, parts in self.measured.items()}
        for meter in meters:
            cached = held(meter.device)
            run = {"kv_cache": cached, **meter.stop()}
            if "peak_allocated" in run:
                beside = self._beside.nbytes(meter.device)
                run["peak_allocated"] -= beside
                run["peak_reserved"] -= beside
                weights = self.measured[meter.device]["weights"]
                # Memory that stays allocated beside the weights: workspace, rounding, buffers.
                tokens = answer if meter.device == self.device else 0
                run["workspace"] = max(0, meter.allocated() - beside - cached - tokens - weights)
                run["activations"] = run["peak_allocated"] - weights - cached - run["workspace"]
            measured[meter.device].update(run)
        self._last, self.measured = workload, measured  # in one assignment, because another thread may ask for a report
        self.count += 1
        if self.publication is not None:
            self.publication.update(measured=summed(self.plan, measured), generations=self.count)
