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
    """The part of a `Search` that is asked here."""

    architecture: Architecture
    workload: Workload

    def finds_plan(self, workload: Workload) -> bool:
        """Tell if there is a plan for a workload."""
        ...

    def holds(self, profile: Profile, workload: Workload) -> bool:
        """Tell if a profile fits the budget at a workload."""
        ...

    def profiles(self, workload: Workload | None = None) -> list[Profile]:
        """Return every profile that the search may come to for a workload, its own by default."""
        ...


def largest_workload(search: Planned, limit: int, workload: Callable[[int], Workload]) -> int:
    """Return the largest number up to `limit` for whose workload bisection finds a plan; 0 if there is none for 1.

    Which savers help depends on the workload, so candidates are generated again for the workload found, and new ones
    are searched too. The result need not be maximal, because the allocator's fragmentation is not monotonic.
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
    """Return `best`, or the largest number above it whose workload one of the profiles holds.

    The profile that needs the least of the GPU is asked first; where the host is short, another may hold more.
    """
    for profile in profiles:
        if best < limit and search.holds(profile, workload(best + 1)):
            best = most(limit, lambda number, profile=profile: search.holds(profile, workload(number)))  # type: ignore[misc]
    return best


def longest_prompt(search: Planned, new: int, batch_size: int) -> int:
    """The most prompt tokens that fit before `new` more, 0 where not even one does."""
    longest = search.architecture.max_position_embeddings - new
    work = replace(search.workload, max_new_tokens=new, batch_size=batch_size)
    return largest_workload(search, longest, lambda length: replace(work, prompt_len=length))


def nearest(search: Planned) -> Workload | None:
    """The longest prompt that fits, with the workload's batch and new tokens, then with a batch of one."""
    work = search.workload
    for batch_size, new in ((work.batch_size, work.max_new_tokens), (1, 1)):
        longest = longest_prompt(search, new, batch_size)
        if longest:
            return replace(work, prompt_len=longest, max_new_tokens=new, batch_size=batch_size)
    return None
