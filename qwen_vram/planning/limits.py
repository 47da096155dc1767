"""Inverse questions: the longest context, the largest batch, the smallest GPU."""

from __future__ import annotations

from dataclasses import replace

from qwen_vram.checkpoints.adapters.folder import AdapterChoice
from qwen_vram.checkpoints.machine_file import current
from qwen_vram.checkpoints.resolve import ModelLike, resolve_model
from qwen_vram.planning.capacity.available_memory import oldest_capability
from qwen_vram.planning.capacity.budget import Budget, VramLike
from qwen_vram.planning.search.largest_workload import largest_workload, longest_prompt
from qwen_vram.planning.search.search import Search
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# More bytes than any host has.
_ANY_HOST = 2**62
# The largest batch that is searched for; no current GPU holds more.
_MOST_SEQUENCES = 4096


def max_context(
    model: ModelLike,
    vram: VramLike = None,
    *,
    profile: str | Profile = "auto",
    ram: str | int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> int:
    """Return the most tokens of one sequence, of which `max_new_tokens` are generated; 0 if nothing fits.

    With `profile="auto"` every saver may be used that `knobs` leave open. `plan` shows which of them a shorter context
    does not need. Each answer takes about twenty estimates, a few seconds.

    Args:
        model, vram, ram, profile, padded, adapter, **knobs: As for `plan`.

    Raises:
        UnknownNameError, WorkloadError, ConfigError, UnitError, NotSupportedError, HubError: as for `plan`.

    Example:
        >>> max_context("Qwen2.5-7B-Instruct", "80GiB", ram="64GiB")
        32768
    """
    label, architecture = resolve_model(model, adapter)
    longest = _workload(architecture, max_new_tokens, batch_size, padded)
    search = Search(label, architecture, longest, Budget.of(vram, ram), profile, knobs, machine=current())
    prompt = longest_prompt(search, max_new_tokens, batch_size)
    return prompt + max_new_tokens if prompt else 0


def max_batch(
    model: ModelLike,
    vram: VramLike = None,
    *,
    profile: str | Profile = "auto",
    ram: str | int | None = None,
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    padded: bool = False,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> int:
    """Return the most sequences of `prompt_len` and `max_new_tokens` tokens at once, up to 4,096; 0 if none fits.

    Savers, arguments and errors are as for `max_context`.
    """
    label, architecture = resolve_model(model, adapter)
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, padded=padded)
    search = Search(label, architecture, workload, Budget.of(vram, ram), profile, knobs, machine=current())
    return largest_workload(search, _MOST_SEQUENCES, lambda number: replace(workload, batch_size=number))


def min_vram(
    model: ModelLike,
    *,
    profile: str | Profile = "auto",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> int:
    """Return the bytes of the smallest `vram` for which `plan` finds a plan for this workload.

    Arguments and errors are as for `plan`.

    Example:
        >>> min_vram("Qwen2.5-7B-Instruct", profile="default") / 2**30 > 15
        True
    """
    label, architecture = resolve_model(model, adapter)
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size, padded=padded)
    budget = Budget(vram=0, ram=_ANY_HOST, capability=oldest_capability([]))
    search = Search(label, architecture, workload, budget, profile, knobs, machine=current())
    return min(candidate.estimate.needed_bytes for candidate in search.candidates())


def _workload(architecture: Architecture, max_new_tokens: int, batch_size: int, padded: bool) -> Workload:
    """The longest workload that the model's positions allow."""
    shortest = Workload(prompt_len=1, max_new_tokens=max_new_tokens, batch_size=batch_size, padded=padded)
    shortest.check(architecture)
    return replace(shortest, prompt_len=architecture.max_position_embeddings - max_new_tokens)
