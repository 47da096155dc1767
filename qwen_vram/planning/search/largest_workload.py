"""The largest workload that fits a budget, by bisection over the profiles of a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from qwen_vram.planning.search.offload_tiers import most
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


class Planned(Protocol):
    """The part of a `Search` that this module uses."""

    architecture: Architecture
    workload: Workload

    def finds_plan(self, workload: Workload) -> bool:
        """Tell if there is a plan for a workload."""
        ...

    def holds(self, profile: Profile, workload: Workload) -> bool:
        """Tell if a profile fits the budget at a workload."""
        ...

    def profiles(self, workload: Workload | None = None) -> list[Profile]:
        """Return every profile that the search may choose for a workload, by default for its own."""
        ...


def largest_workload(search: Planned, limit: int, workload: Callable[[int], Workload]) -> int:
    """Return the largest number up to `limit` for whose workload bisection finds a plan; 0 if 1 has no plan.

    The useful savers depend on the workload, so the candidates are made again for the found workload, and new ones are
    searched too. The result need not be maximal, because the allocator's fragmentation is not monotonic.
    """

    def is_planned(number: int) -> bool:
        return search.finds_plan(workload(number))

    best, asked, profiles = 0, set(), search.profiles()
    while profiles:
        best = _largest_of(search, profiles, limit, workload, best)
        asked |= set(profiles)
        there = search.profiles(workload(max(best, 1)))
        profiles = [profile for profile in there if profile not in asked]
    if not best or is_planned(best):
        return best
    return most(_largest_of(search, search.profiles(workload(best)), best - 1, workload, 0), is_planned)


def _largest_of(
    search: Planned, profiles: list[Profile], limit: int, workload: Callable[[int], Workload], best: int
) -> int:
    """Return `best`, or the largest number above it for whose workload one of the profiles fits.

    The profile that needs the fewest bytes of the GPU is tried first. If the host lacks memory, another one may allow
    more.
    """
    for profile in profiles:
        if best < limit and search.holds(profile, workload(best + 1)):
            best = most(limit, lambda number, profile=profile: search.holds(profile, workload(number)))  # type: ignore[misc]
    return best


def longest_prompt(search: Planned, new: int, batch_size: int) -> int:
    """Return the most prompt tokens that fit before `new` more; 0 if not even one fits."""
    longest = search.architecture.max_position_embeddings - new
    work = replace(search.workload, max_new_tokens=new, batch_size=batch_size)
    return largest_workload(search, longest, lambda length: replace(work, prompt_len=length))


def nearest(search: Planned) -> Workload | None:
    """Return the longest prompt that fits, for the workload's batch and new tokens, then for a batch of one."""
    work = search.workload
    for batch_size, new in ((work.batch_size, work.max_new_tokens), (1, 1)):
        longest = longest_prompt(search, new, batch_size)
        if longest:
            return replace(work, prompt_len=longest, max_new_tokens=new, batch_size=batch_size)
    return None
