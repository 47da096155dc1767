"""`Diagnosis`: findings and facts, as text, as JSON, and as a report to publish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_vram.diagnosis.finding import Finding
from qwen_vram.diagnosis.machine_facts import MachineFacts
from qwen_vram.diagnosis.model_facts import ModelFacts
from qwen_vram.diagnosis.redaction import redacted
from qwen_vram.spec.workload import Workload
from qwen_vram.units import format_bytes

# Accounts on the hub that are no person's: publishers of the families that are counted.
_PUBLISHERS = ("Qwen", "meta-llama")
# Fields whose texts are this library's own, and the report, which is clean already.
_FIXED = ("code", "severity", "fix", "report")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of `doctor`. Its texts have no host names, user names, tokens or folders of users.

    Attributes:
        findings: What was found, the most severe first.
        machine: Facts of the machine.
        model: Facts of the model; `None` if the machine alone was examined.
        reference: The model for which figures of the machine are, if there is no model.
        workload: The lengths for which costs are.
        checks: The number of checks that ran.
    """

    findings: tuple[Finding, ...]
    machine: MachineFacts
    model: ModelFacts | None
    reference: str
    workload: Workload
    checks: int

    @property
    def is_good(self) -> bool:
        """Tell if nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`, redacted; docs/doctor.md describes each field."""
        clean: dict[str, Any] = _cleaned(
            {
                "findings": [one.to_dict() for one in self.findings],
                "model": None if self.model is None else _model(self.model),
                "reference": self.reference,
                "workload": {
                    "prompt_len": self.workload.prompt_len,
                    "max_new_tokens": self.workload.max_new_tokens,
                    "batch_size": self.workload.batch_size,
                    "padded": self.workload.padded,
                },
                "machine": self.machine.to_dict(),
                "checks": self.checks,
                "report": self.report(),
            }
        )
        return clean

    def report(self) -> str:
        """Return Markdown to paste into an issue."""
        lines = ["### qwen-vram doctor", "", *(redacted(f"- {line}") for line in self._facts()), ""]
        if self.is_good:
            lines.append(f"Nothing found by {self.checks} checks.")
        for one in self.findings:
            lines.append(f"- **{one.code}** ({one.severity}): {redacted(one.found)}")
            lines += [f"  - cost: {redacted(one.cost)}", f"  - fix: {one.fix}"]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The findings as text, each with its cost and its fix."""
        lines = []
        for one in self.findings:
            lines += [f"{one.severity}: {one.code}", f"  found: {redacted(one.found)}"]
            lines += [f"  cost:  {redacted(one.cost)}", f"  fix:   {one.fix}"]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Return the number of findings, and the lengths for which costs are."""
        subject = f"{self.reference} with " if self.model is None else ""
        work = self.workload
        lengths = f"{work.prompt_len:,} + {work.max_new_tokens:,} tokens, batch {work.batch_size}"
        count = len(self.findings)
        found = "nothing found" if not count else "1 finding" if count == 1 else f"{count} findings"
        return f"{found} by {self.checks} checks; figures are for {subject}{lengths}"

    def _facts(self) -> Iterator[str]:
        machine, model, work = self.machine, self.model, self.workload
        yield "versions: " + ", ".join(f"{name} {number}" for name, number in machine.versions.items())
        if "torch" not in machine.versions:
            yield "torch is not installed: only the machine and stored models were examined"
        yield f"system: {machine.system}{', WSL' if machine.is_wsl else ''}, Python {machine.python}"
        for gpu in machine.gpus:
            yield f"GPU: {gpu.name}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free{_link(gpu.width)}"
        yield f"driver: {machine.driver}" if machine.driver else "no NVIDIA driver"
        yield (
            f"host: {machine.cpu}, {machine.cores} cores, {format_bytes(machine.ram_available)} of "
            f"{format_bytes(machine.ram_total)} available"
        )
        for name, value in machine.settings.items():
            yield f"{name}={value}"
        if model is not None:
            weights = f"{format_bytes(model.weight_bytes)} of weights ({model.weights_format})"
            yield (
                f"model: {model.kind} ({_public(model.label)}), {weights}, "
                f"{model.attention} attention, on {model.device}"
            )
        yield f"figures for: {work.prompt_len:,} + {work.max_new_tokens:,} tokens, batch {work.batch_size}"


def _link(width: int | None) -> str:
    return "" if width is None else f", {width} PCIe lanes"


def _public(label: str) -> str:
    """A hub id without the account that it belongs to, unless that is a publisher of base models."""
    account, separator, name = label.partition("/")
    return label if not separator or account in _PUBLISHERS else f"<account>/{name}"


def _model(model: ModelFacts) -> dict[str, Any]:
    return {
        "label": _public(model.label),
        "kind": model.kind,
        "is_live": model.is_live,
        "device": model.device,
        "dtype": model.dtype,
        "weights": model.weights_format,
        "weight_bytes": model.weight_bytes,
        "attention": model.attention,
        "sdpa_backend": model.sdpa_backend or None,
        "use_cache": model.generation.use_cache,
        "cache": model.generation.cache or "dynamic",
        "prefill_chunk_size": model.generation.chunk,
        "offload_host": model.offload.host,
        "offload_disk": model.offload.disk,
    }


def _cleaned(value: Any) -> Any:
    """The same data with every text redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: one if name in _FIXED else _cleaned(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(one) for one in value]
    return value
