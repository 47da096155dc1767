"""This library: measurement of `load` and of two generations."""

from __future__ import annotations

import time
from typing import Any

from qwen_vram.benchmark.case import Case, measured_memory, measured_times, predicted
from qwen_vram.benchmark.token_times import EnergyMeter, TokenTimes
from qwen_vram.planning.capacity.nvml import driver
from qwen_vram.runtime.loading.load import load


def measure_own(case: Case) -> dict[str, Any]:
    """Run a case with this library, and return the fields of its row.

    The first generation gives the memory, the times between tokens, and the energy from the first token to the last. A
    second one, of one token, gives the time to the first token with all kernels loaded.
    """
    began = time.perf_counter()
    with load(case.model, **case.arguments, **case.workload, device=case.device, progress=False) as llm:
        loading = time.perf_counter() - began
        plan = llm.plan
        with driver() as pynvml:
            energy = EnergyMeter(pynvml, llm.device)
            cold = TokenTimes(on_first=energy.start)
            report = llm.probe(streamer=cold)
            tokens_per_joule = energy.tokens_per_joule(case.batch_size * (case.max_new_tokens - 1))
        memory = measured_memory(report.measured, llm.device)
        warm = TokenTimes()
        llm.probe(max_new_tokens=1, streamer=warm)
        assert report.times is not None
        return {
            "call": plan.call,
            "predicted": predicted(report.estimate, report.times.predicted, on_cpu=plan.on_cpu),
            "measured": {**memory, **measured_times(cold, warm), "tokens_per_joule": tokens_per_joule}
            | {"load_seconds": loading},
            "promised": None if plan.on_cpu else plan.estimate.process_total,
            "rates": report.times.predicted.place,
        }
