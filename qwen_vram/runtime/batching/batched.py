"""Generations of a plan with pages: sequences of all calls run together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from transformers import Cache

from qwen_vram.arithmetic.batching import DRAWN_TOGETHER, packed_tokens
from qwen_vram.errors import NotSupportedError, WorkloadError
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.batching.batch_job import BatchJob
from qwen_vram.runtime.batching.batcher import Batcher
from qwen_vram.runtime.batching.request import Request
from qwen_vram.runtime.generation.asked import Asked
from qwen_vram.runtime.generation.generations import Generations
from qwen_vram.runtime.generation.kept_cache import Claim
from qwen_vram.runtime.kv_cache.paged import PagePool
from qwen_vram.runtime.measure import PeakMeter
from qwen_vram.runtime.scheduling.job import Job
from qwen_vram.runtime.scheduling.turns import Turns
from qwen_vram.spec.workload import Workload


class BatchedGenerations(Generations):
    """Generations of a loaded model whose plan has pages for several requests.

    Args:
        batcher: The batcher of the model.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self,
        plan: Plan,
        loaded: Mapping[torch.device, dict[str, int]],
        before: Mapping[torch.device, int],
        batcher: Batcher,
        tokenizer: Any,
    ) -> None:
        super().__init__(plan, loaded, before, None)
        self.batcher = batcher
        self._tokenizer = tokenizer

    def close(self) -> None:
        """Release the pages and the steps; the measured figures stay."""
        super().close()
        self.batcher.close()

    def new_cache(self, *, max_length: int) -> Cache:
        """Refuse a cache of the caller's, which no plan with pages counts.

        Raises:
            NotSupportedError: always.
        """
        raise NotSupportedError(
            "a plan with concurrency has pages for its requests, and no other cache; load without concurrency to use "
            "new_cache()",
            knob="cache",
            value="paged",
        )

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
        """Return the job of some sequences, which has not started; see `Generations.job`.

        A turn of a conversation feeds its whole history.

        Args:
            deadline: As for `Generations.job`.

        Raises:
            DoesNotFitError, WorkloadError, NotSupportedError: as for `LoadedModel.chat`, before anything is allocated.
        """
        loaded = model()
        asked = Asked(loaded, options)
        asked.check()
        new = self.plan.workload.max_new_tokens if max_new_tokens is None else max_new_tokens
        masks = inputs["attention_mask"].bool()
        prompts = [row[mask].tolist() for row, mask in zip(inputs["input_ids"], masks, strict=True)]
        for prompt in prompts:
            self._check(Workload(prompt_len=len(prompt), max_new_tokens=new))
        sequences = [prompt for prompt in prompts for _ in range(asked.sequences())]
        requests = [
            Request(loaded, self._tokenizer, ids, new, options, deadline=deadline, place=_place(number, len(sequences)))
            for number, ids in enumerate(sequences)
        ]

        def answered(made: Sequence[Request]) -> None:
            assert claim is not None
            claim.ended(made[0].tokens[made[0].prompt_len :].tolist())

        return BatchJob(
            self.batcher,
            requests,
            inputs,
            self._tokenizer.pad_token_id or 0,
            self.turns,
            self._within,
            answered=None if claim is None else answered,
            ended=ended,
        )

    def _check(self, workload: Workload) -> None:
        """Refuse a request that is longer than the pages, or than the plan's prompts if they are fed as a whole.

        Raises:
            DoesNotFitError: such requests do not fit the budget.
            WorkloadError: they would fit, but the pages are made for shorter ones.
        """
        planned, chunk = self.plan.workload, self.plan.profile.prefill_chunk_size
        self.limits.check_positions(workload)
        if workload.context_len <= planned.context_len and (chunk or workload.prompt_len <= planned.prompt_len):
            return
        self.limits.check_concurrent(workload)
        raise WorkloadError(
            f"a request of {workload.prompt_len:,} + {workload.max_new_tokens:,} tokens is longer than the planned "
            f"{planned.prompt_len:,} + {planned.max_new_tokens:,}, for which the pages are made; load with a larger "
            "prompt_len or max_new_tokens",
            name="prompt_len",
            got=workload.prompt_len,
        )

    def _within(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Run a turn of the batch within the promised memory, and keep what it measured."""
        with self._segments.within("batch", promised=True, always=True):
            meters = [PeakMeter(device) for device in self.devices]
            for meter in meters:
                meter.start()

            def keep() -> None:
                self._keep(self.plan.workload, meters, lambda device: self.batcher.pool.nbytes)

            run(keep)
            keep()


def _place(number: int, sequences: int) -> tuple[int, int]:
    """Return the place of a sequence among those whose seeded draws are made together, which need memory for each."""
    start = number - number % DRAWN_TOGETHER
    return number - start, min(sequences - start, DRAWN_TOGETHER)


def batcher_for(model: Any, plan: Plan, progress: Callable[..., Iterable[int]]) -> tuple[Batcher, float]:
    """Return the batcher of a plan, with its pages allocated and its steps captured, and the seconds of that.

    Args:
        model: A `transformers` model, or a `PeftModel` of one.
        progress: Wraps a range in a progress bar, as `tqdm` does.

    Raises:
        BackendUnavailableError: as for `BatchStep`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    workload, profile = plan.workload, plan.profile
    began = perf_counter()
    made: list[Batcher] = []

    def make(turn: object) -> None:
        pool = PagePool(base, workload.batch_size, workload.context_len)
        made.append(
            Batcher(
                model,
                most=workload.batch_size,
                pool=pool,
                chunk=profile.prefill_chunk_size,
                tokens=packed_tokens(profile, workload),
                captured=profile.captured,
            )
        )

    for _ in progress(range(1), desc="Capturing the decode steps" if profile.captured else "Allocating the pages"):
        # In the thread of generations, with its cuBLAS handle and workspaces.
        job: Job[None] = Job(Turns(), make, base.device)
        job.start()
        job.result()
    return made[0], perf_counter() - began
