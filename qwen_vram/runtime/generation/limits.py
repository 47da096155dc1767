"""Limits of a generation: the plan's lengths, and its budget for everything else."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from qwen_vram.arithmetic.gpu_split import split_of
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.planning.planner import Plan
from qwen_vram.planning.search.search import Search
from qwen_vram.runtime.generation.asked import Asked
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


class Limits:
    """Comparison of generations with a plan and its budget, before anything is allocated."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def cache_length(self, workload: Workload, *, longest: bool = False) -> int:
        """Return the length of a preallocated cache that fits: the planned one, so that its block is used again.

        A block for each length would leave longer and longer blocks reserved beside the promised memory. The length is
        that of the workload if it is longer than planned, or if unplanned padding leaves no memory for more.

        Args:
            longest: Prefer the planned length for a longer prompt too, if the whole context is not longer than planned.

        Raises:
            DoesNotFitError, WorkloadError: as for `LoadedModel.chat`.
        """
        planned, architecture = self._plan.workload, self._plan.estimate.architecture
        assert architecture is not None
        workload.check(architecture)
        covered = self.is_covered(workload)
        if covered and (planned.padded or not workload.padded):
            return planned.context_len
        if covered or (longest and workload.context_len < planned.context_len):
            with suppress(DoesNotFitError):
                self._check_room(replace(workload, max_new_tokens=planned.context_len - workload.prompt_len))
                return planned.context_len
        self._check_room(workload)
        return workload.context_len

    def is_covered(self, workload: Workload) -> bool:
        """Tell if the plan's own workload has at least the sequences and tokens of this one."""
        planned = self._plan.workload
        return (
            workload.batch_size <= planned.batch_size
            and workload.prompt_len <= planned.prompt_len
            and workload.context_len <= planned.context_len
        )

    def is_promised(self, asked: Asked, workload: Workload) -> bool:
        """Tell if the plan's estimate covers the generation; any other one has been compared with the budget."""
        planned = self._plan
        padding = planned.workload.padded or not workload.padded
        same = not asked.brings_cache() and asked.profile(planned.profile) == planned.profile
        return padding and same and self.is_covered(workload)

    def check_positions(self, workload: Workload) -> None:
        """Refuse a context that exceeds the model's positions.

        Raises:
            WorkloadError: it does.
        """
        assert self._plan.estimate.architecture is not None
        workload.check(self._plan.estimate.architecture)

    def check_concurrent(self, workload: Workload) -> None:
        """Refuse a request if the planned number of such requests does not fit the budget.

        Raises:
            DoesNotFitError: it does not fit.
        """
        self._check_room(replace(workload, batch_size=self._plan.workload.batch_size))

    def _check_room(self, workload: Workload) -> None:
        """Refuse a workload that does not fit the budget."""
        self._search(self._plan.profile, workload, session=False).run("quality")

    def check_asked(self, asked: Asked, workload: Workload) -> None:
        """Compare the cache and the chunk size of the options with the budget.

        Raises:
            DoesNotFitError: they do not fit.
            NotSupportedError: no estimate counts them.
        """
        profile = asked.profile(self._plan.profile)
        held = asked.cache_length() - workload.prompt_len
        if held > workload.max_new_tokens:
            workload = replace(workload, max_new_tokens=held)
        if profile == self._plan.profile:
            if not self.is_covered(workload):
                self._check_room(workload)
            return
        self._search(profile, workload, session=True).run("quality")

    def _search(self, profile: Profile, workload: Workload, *, session: bool) -> Search:
        """Return the search that compares `workload` with the plan's budget and split."""
        known, budget = self._plan.estimate, self._plan.budget
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
