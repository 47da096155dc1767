"""Public questions: a plan, a device map, the largest workload, the smallest GPU.

Each function makes a `Workload` and a `Budget` of its arguments, so that a new property of them is named here.
"""

from __future__ import annotations

from dataclasses import replace

from qwen_vram.checkpoints.adapters.folder import AdapterChoice
from qwen_vram.checkpoints.machine_file import current
from qwen_vram.checkpoints.resolve import ModelLike, adapted, own_adapter, resolve, resolve_model, stored_knobs
from qwen_vram.errors import WorkloadError
from qwen_vram.estimator import warn_of_positions
from qwen_vram.planning.capacity.available_memory import oldest_capability
from qwen_vram.planning.capacity.budget import Budget, VramLike
from qwen_vram.planning.capacity.fit import fits, on_device
from qwen_vram.planning.capacity.hardware import as_measured
from qwen_vram.planning.capacity.refusal import shortage
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.planning.placement import Where, place, place_on, streaming
from qwen_vram.planning.planner import Plan, plan_for
from qwen_vram.planning.search.largest_workload import largest_workload, longest_prompt
from qwen_vram.planning.search.search import Prefer, Search
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.batching.concurrency import concurrent, paged_knobs
from qwen_vram.spec.profile import Profile, resolve_profile
from qwen_vram.spec.workload import Workload
from qwen_vram.units import parse_bytes

# More bytes than any host has.
_ANY_HOST = 2**62
# The largest batch that is searched for; no current GPU holds more.
_MOST_SEQUENCES = 4096


def plan(
    model: ModelLike,
    *,
    profile: str | Profile = "auto",
    vram: VramLike = None,
    ram: str | int | None = None,
    reserve: str | int | None = None,
    prefer: Prefer = "quality",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    concurrency: int | None = None,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> Plan:
    """Find the least lossy profile for `model` and a workload within a budget, by arithmetic alone.

    With `profile="auto"` the knobs named in `knobs` stay as the caller set them, and the others are searched. Lossless
    savers (chunks, host embeddings) come first, then precision of weights, head and cache, then the cache on the host.
    Context and batch are never shortened. With any other profile nothing is searched, and the plan is that profile if
    it fits.

    Args:
        model: As for `estimate_vram`.
        profile: `"auto"`, a name from `PROFILES`, or a `Profile`.
        vram: The most bytes that nvidia-smi may show for the process: `"8GiB"`, an `int` of bytes, or a dict by GPU
            number. `None` is the memory that is free now; without a GPU the plan is for the host. A dict of several
            GPUs (`{0: "20GiB", 1: "20GiB"}`) splits the layers over all of them. The age of a GPU in this machine
            limits the kernels; a GPU that is not in it counts as Ampere or newer.
        ram: The same for the host; `None` is the memory that is available now.
        reserve: Bytes of each GPU, or of the host if there is no GPU, that stay free: a size, or 0. `None` is 256 MiB
            if `vram` is read from the machine, and 0 if it is given.
        prefer: Among the profiles that fit, `"quality"` takes the first one, `"memory"` the smallest one, and `"speed"`
            the one with the shortest predicted generation.
        batch_size: Prompts at once. The checkpoint's generation_config.json sets the number of sequences for each.
        padded: Prompts of a batch differ in length, so that attention needs a mask, and memory for it.
        concurrency: Requests of up to `prompt_len` and `max_new_tokens` that run at once and independently, each with
            pages of a common KV cache. `None` is one call after the other.
        adapter: Folder or hub id of a LoRA adapter that runs beside the base; `False` if the one in the model's own
            folder is merged already.

    Raises:
        DoesNotFitError: nothing fits; the exception has the bytes, the estimate and the nearest workload.
        NotSupportedError: the model or the knobs load on no machine, or a knob works on one GPU only and `vram` names
            several.
        UnknownNameError, WorkloadError, ConfigError, UnitError, HubError: as for `estimate_vram`.
    """
    batch_size, knobs = concurrent(concurrency, batch_size, knobs)
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size, padded=padded)
    budget = Budget.of(vram, ram, reserve)
    adapter = own_adapter(model, adapter)
    found = resolve(model, adapter)
    result = plan_for(
        model,
        workload,
        budget,
        found=found,
        architecture=adapted(found, adapter),
        profile=profile,
        prefer=prefer,
        adapter=adapter,
        computes=as_measured,
        **knobs,
    )
    warn_of_positions(result.estimate)
    return result


def offload_map(
    model: ModelLike,
    *,
    vram: VramLike = None,
    ram: str | int | None = None,
    reserve: str | int | None = None,
    layers_on_cpu: int | None = None,
    profile: str | Profile = "default",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> dict[str, Where]:
    """Make a `device_map` that leaves memory for cache and activations, with the fewest bytes on the host.

    The token embeddings are moved to the host first (rows can be gathered there), then decoder layers, spread evenly.
    Slots on the device are counted for streamed layers. Tied embeddings stay on the device, because the head needs
    them, unless the head is a copy (`lm_head`). Layers that do not fit on the host are "disk": in the checkpoint's
    files.

    Args:
        model: As for `estimate_vram`.
        vram: The most bytes that nvidia-smi may show; `None` is the memory that is free now. With several GPUs (a dict
            by number) every layer stays on one of them.
        reserve: As for `plan`.
        ram: The same for the host; `None` is the memory that is available now.
        layers_on_cpu: The number of layers on the host, for any budget; the token embeddings stay on the device. The
            article's third row is `layers_on_cpu=3`. The budget is then checked only if `vram` or `reserve` is given.
        profile: The profile whose weights, cache and attention are counted.
        padded, adapter: As for `plan`.

    Raises:
        DoesNotFitError: not even all layers on the host fit the budget.
        NotSupportedError: layers on the host and several GPUs.
        WorkloadError: a length out of range, or more layers than the model has.
        UnknownNameError, UnitError, ConfigError: as for `estimate_vram`.

    Example:
        >>> where = offload_map("Qwen2.5-7B-Instruct", layers_on_cpu=3)
        >>> [name for name, device in where.items() if device == "cpu"]
        ['model.layers.8', 'model.layers.17', 'model.layers.27']
    """
    label, architecture = resolve_model(model, adapter)
    chosen = resolve_profile(profile, **stored_knobs(architecture, knobs))
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size, padded=padded)
    layers = architecture.num_hidden_layers
    if layers_on_cpu is not None:
        if isinstance(layers_on_cpu, bool) or not isinstance(layers_on_cpu, int) or not 0 <= layers_on_cpu <= layers:
            raise WorkloadError(
                f"layers_on_cpu must be between 0 and the model's num_hidden_layers {layers}, got {layers_on_cpu!r}",
                name="layers_on_cpu",
                got=layers_on_cpu,
            )
        tried = [streaming(chosen, layers_on_cpu)]
        if vram is None and reserve is None:
            if ram is not None:
                parse_bytes(ram, name="ram")
            return place(architecture, tried[0]).device_map
    else:
        on_host = chosen.replace(embeddings="host")
        tried = [chosen, on_host, *(streaming(on_host, count) for count in range(1, layers + 1))]
    budget = Budget.of(vram, ram, reserve)
    if budget.vram is None:
        return place(architecture, chosen, device="cpu").device_map
    search = Search(label, architecture, workload, budget, chosen, {}, machine=current())
    search.tiers.may_read = "disk_layers" not in knobs
    if search.several and layers_on_cpu is None:
        tried = tried[:2]
    for candidate in tried:
        result = search.estimate(candidate, workload)
        if on_device(result, budget):
            result = search.tiers.fewest_on_disk(result)
        if fits(result, budget):
            return place_on(budget, result).device_map
    short = shortage(result, budget)
    raise DoesNotFitError(
        f"{label} with {result.profile.streamed_layers} of {layers} layers on the host needs {short.needs}; "
        f"{short.allowed} are allowed; use weights='nf4', a prefill_chunk_size, or a shorter context",
        needed_bytes=short.needed_bytes,
        budget_bytes=short.budget_bytes,
        estimate=result,
        nearest=None,
        devices=short.devices,
    )


def max_context(
    model: ModelLike,
    vram: VramLike = None,
    *,
    profile: str | Profile = "auto",
    ram: str | int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    concurrency: int | None = None,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> int:
    """Return the most tokens of one sequence, of which `max_new_tokens` are generated; 0 if nothing fits.

    With `profile="auto"` every saver may be used that `knobs` leave open. `plan` shows which of them a shorter context
    does not need. Each answer takes about twenty estimates, a few seconds.

    Args:
        model, vram, ram, profile, padded, concurrency, adapter, **knobs: As for `plan`.

    Raises:
        UnknownNameError, WorkloadError, ConfigError, UnitError, NotSupportedError, HubError: as for `plan`.

    Example:
        >>> max_context("Qwen2.5-7B-Instruct", "80GiB", ram="64GiB")
        32768
    """
    batch_size, knobs = concurrent(concurrency, batch_size, knobs)
    label, architecture = resolve_model(model, adapter)
    budget = Budget.of(vram, ram)
    knobs = paged_knobs(profile, knobs, on_gpu=budget.vram is not None)
    longest = _workload(architecture, max_new_tokens, batch_size, padded)
    search = Search(label, architecture, longest, budget, profile, knobs, machine=current())
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


def max_concurrency(
    model: ModelLike,
    vram: VramLike = None,
    *,
    profile: str | Profile = "auto",
    ram: str | int | None = None,
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> int:
    """Return the most requests at once, up to 4,096, for `plan(concurrency=...)`; 0 if not one fits.

    Savers, arguments and errors are as for `max_context`.

    Example:
        >>> max_concurrency("Qwen2.5-7B-Instruct", "24GiB", profile="default", prompt_len=1500, max_new_tokens=500) > 50
        True
    """
    label, architecture = resolve_model(model, adapter)
    budget = Budget.of(vram, ram)
    _, knobs = concurrent(1, 1, knobs)
    knobs = paged_knobs(profile, knobs, on_gpu=budget.vram is not None)
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens)
    search = Search(label, architecture, workload, budget, profile, knobs, machine=current())
    return largest_workload(search, _MOST_SEQUENCES, lambda number: replace(workload, batch_size=number))


def min_vram(
    model: ModelLike,
    *,
    profile: str | Profile = "auto",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    concurrency: int | None = None,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> int:
    """Return the bytes of the smallest `vram` for which `plan` finds a plan for this workload.

    Arguments and errors are as for `plan`.

    Example:
        >>> min_vram("Qwen2.5-7B-Instruct", profile="default") / 2**30 > 15
        True
    """
    batch_size, knobs = concurrent(concurrency, batch_size, knobs)
    knobs = paged_knobs(profile, knobs, on_gpu=True)
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
