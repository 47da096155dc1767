"""Reach: the largest workload that a search's profiles hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.planning.fit import fits
from qwen_vram.planning.tiers import most

if TYPE_CHECKING:
    from qwen_vram.planning.search import Search


def reach(search: Search, limit: int, workload: Callable[[int], Workload]) -> int:
    """A number up to `limit` for whose workload there is a plan, as large as halving finds; 0 where that of 1 has none.

    Which profiles save anything depends on the workload, so those of the workload that was reached are asked too; and
    where its plan is none of those that reach it, how far its own go. Fragments of torch's allocator do not grow
    evenly, so that a larger workload may fit where one between does not.
    """

    def is_planned(number: int) -> bool:
        return fits(search.at(workload(number)).find("quality")[-1].estimate, search.budget)

    best, asked, profiles = 0, set(), search.profiles()
    while profiles:
        best = _farthest(search, profiles, limit, workload, best)
        asked |= set(profiles)
        there = search.at(workload(max(best, 1))).profiles()
        profiles = [profile for profile in there if profile not in asked]
    if not best or is_planned(best):
        return best
    return most(_farthest(search, search.at(workload(best)).profiles(), best - 1, workload, 0), is_planned)


def _farthest(
    search: Search, profiles: list[Profile], limit: int, workload: Callable[[int], Workload], best: int
) -> int:
    """`best`, or the largest number beyond it whose workload one of the profiles holds.

    The profile that needs the least of the GPU is asked first; where the host is short, another may hold more.
    """
    for profile in profiles:
        if best < limit and search.holds(profile, workload(best + 1)):
            best = most(limit, lambda number, profile=profile: search.holds(profile, workload(number)))  # type: ignore[misc]
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
