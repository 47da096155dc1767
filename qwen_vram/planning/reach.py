"""Reach: the largest workload that a search's profiles hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_vram.arithmetic.workload import Workload
from qwen_vram.planning.fit import fits
from qwen_vram.planning.tiers import most

if TYPE_CHECKING:
    from qwen_vram.planning.search import Search


def reach(search: Search, limit: int, workload: Callable[[int], Workload]) -> int:
    """The largest number up to `limit` for whose workload a plan is found; 0 where that of 1 has none.

    The profile that needs the least of the GPU is asked first; where the host is short, another may hold more. Which
    profiles save anything depends on the workload, so those of the workload that was reached are asked too. Fragments
    of torch's allocator do not grow evenly, so that a larger workload may fit where one between does not.
    """
    best = _reach_of_profiles(search, limit, workload)
    if not best or _is_planned(search.at(workload(best))):
        return best
    return most(best - 1, lambda number: _is_planned(search.at(workload(number))))


def _is_planned(search: Search) -> bool:
    return fits(search.find("quality").estimate, search.budget)


def _reach_of_profiles(search: Search, limit: int, workload: Callable[[int], Workload]) -> int:
    """The largest number that any of the search's profiles holds. A plan may leave out the one that does."""
    best, asked, profiles = 0, set(), search.profiles()
    while profiles:
        for profile in profiles:
            if best < limit and search.holds(profile, workload(best + 1)):
                best = most(limit, lambda number, profile=profile: search.holds(profile, workload(number)))  # type: ignore[misc]
        asked |= set(profiles)
        there = search.at(workload(min(best + 1, limit))).profiles()
        profiles = [profile for profile in there if profile not in asked]
    return best


def longest_prompt(search: Search, new: int, batch_size: int) -> int:
    """The most prompt tokens that fit before `new` more, 0 where not even one does."""
    longest = search.architecture.max_position_embeddings - new
    work = replace(search.workload, max_new_tokens=new, batch_size=batch_size)
    return reach(search, longest, lambda length: replace(work, prompt_len=length))


def nearest(search: Search) -> Workload | None:
    """The longest prompt that fits, with the workload's batch and new tokens, then with a batch of one."""
    work = search.workload
    for batch_size, new in ((work.batch_size, work.max_new_tokens), (1, 1)):
        longest = longest_prompt(search, new, batch_size)
        if longest:
            return replace(work, prompt_len=longest, max_new_tokens=new, batch_size=batch_size)
    return None
