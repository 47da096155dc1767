"""The planner: the first profile that fits a budget, least lossy first.

`Plan` is its result, and the loader follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import split_estimate, split_of
from qwen_vram.arithmetic.timing.generation import Times, times_of
from qwen_vram.checkpoints.adapters.folder import AdapterChoice
from qwen_vram.checkpoints.machine_file import current
from qwen_vram.checkpoints.resolve import ModelLike, Resolved
from qwen_vram.errors import ConfigError, QwenVramError, UnknownNameError
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.capacity.hardware import Computes, limits_of, slower_on_the_cpu, with_this_cpu
from qwen_vram.planning.placement import Placement, Where, place_on
from qwen_vram.planning.search.candidates import Step
from qwen_vram.planning.search.decode_graph import not_captured, said_of
from qwen_vram.planning.search.search import Prefer, Search
from qwen_vram.planning.sequences import sequences_per_prompt
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.batching.concurrency import paged_knobs
from qwen_vram.spec.profile import KNOBS, PROFILES, Profile
from qwen_vram.spec.residency import Residency, residency
from qwen_vram.spec.workload import Workload
from qwen_vram.units import format_bytes, format_gib

if TYPE_CHECKING:
    from qwen_vram.planning.vllm.arguments import VllmArguments, VllmCommand


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A profile for a model, a workload and a budget, with its predicted memory and times.

    `load()` follows it, and `LoadedModel.report()` checks it.

    Attributes:
        estimate: The prediction, with model, profile and workload.
        budget: The budget that the plan was made for.
        placement: The location of each module.
        steps: Every candidate of the search, in order.
        model: The model as the caller named it; `None` for a config or an `Architecture`.
        adapter: The LoRA adapter beside it, as the caller named it; `None` without one, `False` if the one in the
            model's own folder is left out.
        sequences: Sequences of each prompt, by the checkpoint's generation_config.json (beams, or several answers).
            The workload's batch counts all of them.
    """

    estimate: Estimate
    budget: Budget
    placement: Placement
    steps: tuple[Step, ...]
    model: str | None = None
    adapter: str | Literal[False] | None = None
    sequences: int = 1

    @property
    def profile(self) -> Profile:
        """The knobs of the plan."""
        return self.estimate.profile

    @property
    def workload(self) -> Workload:
        """The lengths and the batch of the plan."""
        return self.estimate.workload

    @property
    def concurrency(self) -> int:
        """The number of requests that run at once: 1 without pages, as each call then waits for its turn."""
        return self.workload.batch_size if self.profile.cache == "paged" else 1

    @property
    def residency(self) -> Residency:
        """The location of each layer, the token embeddings and the head: the device, the host, or the files."""
        assert self.estimate.architecture is not None
        return residency(self.estimate.architecture, self.profile)

    @property
    def device_map(self) -> dict[str, Where]:
        """The location of each module, in the form of `transformers`."""
        return self.placement.device_map

    @property
    def on_cpu(self) -> bool:
        """Tell if everything runs on the host, because there is no GPU or the caller chose so."""
        return self.placement.norm == "cpu"

    @property
    def budget_text(self) -> str:
        """The budget in words, such as `8.00 GiB of the GPU`."""
        return str(self.budget)

    @property
    def times(self) -> Times:
        """The predicted times of a generation, and the machine that they are for."""
        return times_of(self.estimate, on_cpu=self.on_cpu)

    @property
    def not_captured(self) -> str | None:
        """The reason why decode steps on GPUs are launched one by one; `None` if they are captured, and on a CPU."""
        return None if self.on_cpu else not_captured(self.estimate)

    @property
    def predicted_lines(self) -> tuple[str, ...]:
        """The predicted times in words; if decode steps are not captured, also the reason and the cost of that."""
        launched = None if self.on_cpu else said_of(self.estimate)
        return (f"predicted: {self.times}", *([launched] if launched else []))

    @property
    def notes(self) -> tuple[str, ...]:
        """Requests at once, the predicted times, and what an old GPU changes or the CPU does slowly, if any."""
        paged = self.profile.cache == "paged"
        at_once = f"{self.concurrency:,} request{'s' * (self.concurrency > 1)} at once" if paged else ""
        limited = slower_on_the_cpu(self.estimate) if self.on_cpu else limits_of(self.budget, self.profile)
        return tuple(line for line in (at_once, *self.predicted_lines, limited) if line)

    @property
    def call(self) -> str:
        """The `load` call that builds this plan without a search."""
        model = "config" if self.model is None else repr(self.model)
        where = ", device='cpu'" if self.budget.vram is None else f", vram={self.budget.given}"
        plain, work = PROFILES["default"], self.workload
        paged = self.profile.cache == "paged"
        if paged:  # what `concurrency` alone gives
            plain = plain.replace(**paged_knobs("default", {"cache": "paged"}, on_gpu=self.budget.vram is not None))
        batch = f"{'concurrency' if paged else 'batch_size'}={work.batch_size // self.sequences}"
        padded = ", padded=True" if work.padded else ""
        adapter = f", adapter={self.adapter!r}" if self.adapter is not None else ""
        chosen = {knob: getattr(self.profile, knob) for knob in KNOBS}
        knobs = "".join(f", {knob}={value!r}" for knob, value in chosen.items() if value != getattr(plain, knob))
        return (
            f"qv.load({model}, profile='default'{where}, prompt_len={work.prompt_len}, "
            f"max_new_tokens={work.max_new_tokens}, {batch}{padded}{adapter}{knobs})"
        )

    @property
    def served_at_once(self) -> int:
        """The number of sequences that a server of this plan runs at once."""
        return self.workload.batch_size

    def to_vllm(
        self,
        *,
        checkpoint: str | Path | None = None,
        kv_cache_dtype: str | None = None,
        tensor_parallel: int | None = None,
        pipeline_parallel: int | None = None,
        nodes: int = 1,
        node_rank: int = 0,
        master_addr: str | None = None,
        executor: Literal["mp", "ray"] | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        served_model_name: str | None = None,
    ) -> VllmArguments:
        """Return the arguments of `vllm serve` that run this plan, with notes on what is different there.

        vLLM is not imported, and need not be installed. The budget's rest after vLLM's own weights, activations and
        graphs is for keys and values; on a CPU, it is what the planned sequences need.

        Args:
            checkpoint: A checkpoint of the same model in a format of vLLM (GPTQ, AWQ, compressed-tensors, fp8), in
                place of the plan's. Without it, a quantized plan of a 16-bit checkpoint runs in vLLM's online fp8.
            kv_cache_dtype: A format of vLLM's cache in place of the one that the plan maps to.
            tensor_parallel, pipeline_parallel: Workers that share each layer, and groups of layers. `None`: each layer
                is shared by the GPUs of a node if its heads divide, and nodes have consecutive layers.
            nodes: Machines, each with the GPUs of the plan.
            node_rank, master_addr: The number of this machine, and the address of the first one.
            executor: `"mp"` or `"ray"`.
            host, port, served_model_name: The server's address, and the model's name in requests.

        Raises:
            NotSupportedError: the plan has a saver, a format or an adapter that vLLM does not have.
            DoesNotFitError: the budget does not hold vLLM's own memory with the planned sequences.
            WorkloadError: a number of workers or nodes that the model or the plan does not allow, or a checkpoint of
                another model.
            UnknownNameError, ConfigError, CheckpointError, HubError: a wrong name, or a checkpoint that cannot be read.
        """
        from qwen_vram.planning.vllm.arguments import Address, Nodes, vllm_arguments  # few plans are for vLLM

        return vllm_arguments(
            self.estimate,
            self.budget,
            self.model,
            self.served_at_once,
            nodes=Nodes(tensor_parallel, pipeline_parallel, nodes, node_rank, master_addr, executor),
            address=Address(host, port, served_model_name),
            checkpoint=checkpoint,
            kv_cache_dtype=kv_cache_dtype,
        )

    def vllm_command(self, **options: Any) -> VllmCommand:
        """Return the command of `to_vllm` as a list of strings; `str()` of it is one line, quoted for a shell.

        Args:
            **options: As for `to_vllm`.

        Raises:
            NotSupportedError, DoesNotFitError, WorkloadError, UnknownNameError: as for `to_vllm`.
        """
        return self.to_vllm(**options).command()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps` and for `from_dict`; sizes in bytes."""
        assert self.estimate.architecture is not None
        return {
            "model": self.estimate.model,
            "source": self.model,
            "adapter": self.adapter,
            "sequences": self.sequences,
            "concurrency": self.concurrency,
            "call": self.call,
            "profile": asdict(self.profile),
            "estimate": self.estimate.to_dict(),
            "times": self.times.to_dict(),
            "not_captured": self.not_captured,
            "budget": asdict(self.budget),
            "split": split_of(self.estimate),
            "device_map": self.device_map,
            "steps": [step._asdict() for step in self.steps],
            "architecture": self.estimate.architecture.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Make the plan of `to_dict`'s data, also from JSON; this version and machine compute its estimate again.

        Raises:
            ConfigError: a part is missing or has another form, or the split is not one of this model.
            UnknownNameError, WorkloadError: a knob or a length is out of range.
        """
        try:
            architecture = Architecture.from_dict(data["architecture"])
            profile = Profile(**data["profile"])
            workload = Workload(**data["estimate"]["workload"])
            budget = Budget.from_dict(data["budget"])
            split = {int(device): count for device, count in data.get("split", {}).items()}
            steps = tuple(Step(**step) for step in data["steps"])
            label, model, adapter = data["model"], data["source"], data.get("adapter")
            sequences = int(data.get("sequences", 1))
        except QwenVramError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"this is no plan ({type(error).__name__}: {error}); pass what Plan.to_dict() gave, or "
                "qwen-vram plan --json"
            ) from error
        what = (label, architecture, profile, workload)
        if not split and len(budget.devices) < 2:
            machine = with_this_cpu(current(), on_cpu=budget.vram is None)
            alone = estimate(*what, machine=machine, session=True, held=budget.held_on_one)
            return _plan(alone, budget, steps, model=model, adapter=adapter, sequences=sequences)
        layers = architecture.num_hidden_layers
        counted = all(type(count) is int and count > 0 for count in split.values())
        if not counted or sum(split.values()) != layers or split.keys() != budget.devices.keys():
            raise ConfigError(
                f"this is no plan (split {split} of {layers} layers over the GPUs {list(budget.devices)}); pass what "
                "Plan.to_dict() gave, or qwen-vram plan --json"
            )
        result = split_estimate(*what, split, machine=current(), session=True, held=budget.held)
        return _plan(result, budget, steps, model=model, adapter=adapter, sequences=sequences)

    def __str__(self) -> str:
        """The steps of the search, the table of the estimate, and the equivalent `load` call."""
        lines = [f"plan for {self.estimate.model}"]
        for step in self.steps:
            saved = f", saves {format_bytes(step.saved_bytes)}" if step.saved_bytes > 0 else ""
            needs = f"needs {format_gib(step.needed_bytes)}{saved}, {step.decode_floor_ms:.1f} ms/token or more"
            lines.append(f"  {step.change}: {needs} ({step.cost})")
        if self.sequences > 1:
            asked = "as num_beams and num_return_sequences in generation_config.json ask"
            lines.append(f"  {self.sequences} sequences for each prompt, {asked}")
        lines.append(f"  fits in {self.budget_text}")
        lines += [f"  {line}" for line in self.notes]
        return "\n".join([*lines, str(self.estimate), self.call])

    def _repr_html_(self) -> str:
        """The estimate's table and the predicted times, for a notebook."""
        from html import escape  # slow to import, and only needed here

        lines = "<br>".join(escape(line) for line in self.notes)
        return f"{self.estimate._repr_html_()}<p>{lines}</p><pre>{escape(self.call)}</pre>"


def plan_for(
    model: ModelLike,
    workload: Workload,
    budget: Budget,
    *,
    found: Resolved,
    architecture: Architecture,
    profile: str | Profile = "auto",
    prefer: Prefer = "quality",
    adapter: AdapterChoice = None,
    computes: Computes,
    **knobs: object,
) -> Plan:
    """Make a plan as `plan()` does, for a known budget, without its warnings.

    Args:
        found: The result of `resolve(model)`, so that a folder is read once.
        architecture: The same with the adapter's tensors, so that an adapter is read once too.
        computes: As for `Search`.
    """
    if prefer not in ("quality", "speed", "memory"):
        raise UnknownNameError("prefer", prefer, ("quality", "speed", "memory"))
    workload.check(architecture)
    sequences = sequences_per_prompt(found)
    knobs = paged_knobs(profile, knobs, on_gpu=budget.vram is not None)
    paged = "paged" in (knobs.get("cache"), getattr(profile, "cache", None))  # requests over pages need no padding
    workload = replace(workload, batch_size=workload.batch_size * sequences, padded=workload.padded and not paged)
    machine = with_this_cpu(current(), on_cpu=budget.vram is None)
    search = Search(found.label, architecture, workload, budget, profile, knobs, machine=machine, computes=computes)
    best = search.run(prefer)
    named = str(model) if isinstance(model, str | Path) else None
    beside = str(adapter) if isinstance(adapter, Path) else adapter
    return _plan(best.estimate, budget, best.steps, model=named, adapter=beside, sequences=sequences)


def _plan(result: Estimate, budget: Budget, steps: tuple[Step, ...], **named: Any) -> Plan:
    return Plan(estimate=result, budget=budget, placement=place_on(budget, result), steps=steps, **named)
