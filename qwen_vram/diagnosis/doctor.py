"""`doctor()`: find what costs memory or time, in a model and on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_vram.diagnosis.checks import OF_MACHINES, OF_MODELS
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import SEVERITIES, Finding
from qwen_vram.diagnosis.machine_facts import MachineFacts, examine_machine
from qwen_vram.diagnosis.model_facts import ModelFacts
from qwen_vram.diagnosis.report import Diagnosis
from qwen_vram.diagnosis.stored_model import examine_stored
from qwen_vram.spec.workload import Workload

# The model for which figures of a machine are, if none is given: the article's.
REFERENCE = "Qwen/Qwen2.5-7B-Instruct"


def doctor(
    model: object = None,
    *,
    prompt_len: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    machine: MachineFacts | None = None,
    measure: bool | None = None,
) -> Diagnosis:
    """Find what costs memory or time, with its cost in bytes or milliseconds, and the fix. Nothing is changed.

    Do not call it while another thread runs the model: hooks of offloaded modules are run to measure them.

    Args:
        model: A live model of `transformers`, a `LoadedModel`, or the name, folder or hub id of a checkpoint, which is
            examined as a plain `from_pretrained` would load it here. `None` examines the machine alone.
        prompt_len: Prompt tokens for which costs are; `None` is 4,096, or what the model's positions leave.
        max_new_tokens, batch_size, padded: As for `estimate_vram`.
        machine: Facts of another machine; `None` examines this one.
        measure: Time copies from host memory to the GPU, which needs a CUDA context. `None` is true if this process
            has one already.

    Raises:
        ConfigError: `model` is neither a model nor a name.
        UnknownNameError, CheckpointError, HubError: as `estimate_vram`.
        WorkloadError: a length is not positive, or the context exceeds the model's positions.

    Example:
        >>> doctor("Qwen2.5-7B-Instruct").model.label
        'Qwen/Qwen2.5-7B-Instruct'
    """
    given = Workload(
        prompt_len=1 if prompt_len is None else prompt_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        padded=padded,
    )
    if machine is None:
        machine = examine_machine(measure=_has_context() if measure is None else measure)
    facts = None if model is None else _examine(model, machine, prompt_len or _PROMPT, padded)
    examined = facts or examine_stored(REFERENCE, machine)
    workload = _workload(examined, given, prompt_len)
    subject = Subject(examined, machine, workload)
    workload.check(subject.architecture)
    checks = (*(OF_MODELS if facts else ()), *OF_MACHINES)
    findings = [finding for check in checks for finding in check(subject)]
    return Diagnosis(
        findings=tuple(sorted(findings, key=_order)),
        machine=machine,
        model=facts,
        reference="" if facts else REFERENCE,
        workload=workload,
        checks=len(checks),
    )


# Prompt tokens for which costs are: long enough for attention and activations to show.
_PROMPT = 4096


def _examine(model: object, machine: MachineFacts, prompt_len: int, padded: bool) -> ModelFacts:
    if isinstance(model, (str, Path)):
        return examine_stored(model, machine)
    from qwen_vram.diagnosis.live_model import examine_model  # imports torch

    return examine_model(model, rows=prompt_len, masked=padded)


def _workload(model: ModelFacts, given: Workload, prompt_len: int | None) -> Workload:
    """The workload with the default prompt, shortened to the model's positions."""
    if prompt_len is not None:
        return given
    left = model.number("max_position_embeddings", _PROMPT + given.max_new_tokens) - given.max_new_tokens
    return Workload(
        prompt_len=max(1, min(_PROMPT, left)),
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size,
        padded=given.padded,
    )


def _order(finding: Finding) -> tuple[int, float]:
    return SEVERITIES.index(finding.severity), -float(finding.cost_bytes or 0)


def _has_context() -> bool:
    """Tell if this process has a CUDA context."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
