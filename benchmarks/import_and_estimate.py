"""How long `import qwen_vram`, the first estimate and a further one take: medians.

Usage: python benchmarks/import_and_estimate.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time

import qwen_vram as qv

PROCESSES = 21
ESTIMATES = 2_000
IMPORT = "import time; t = time.perf_counter(); import qwen_vram{then}; print(time.perf_counter() - t)"
FIRST = "; qwen_vram.estimate_vram('Qwen2.5-7B-Instruct')"


def import_ms(then: str = "") -> float:
    """Median milliseconds of the import, and what follows it, in fresh processes, bytecode cached."""
    command = [sys.executable, "-c", IMPORT.format(then=then)]
    times = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(PROCESSES)]
    return 1000 * statistics.median(times[1:])


def estimate_ms() -> float:
    """Median milliseconds of an estimate that no cache has seen: every call asks for another length."""
    times = []
    for index in range(ESTIMATES):
        start = time.perf_counter()
        qv.estimate_vram("Qwen/Qwen2.5-7B-Instruct", "int4-flash", prompt_len=500 + index)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    row = {
        "import_ms": round(import_ms(), 1),
        "import_and_first_estimate_ms": round(import_ms(FIRST), 1),
        "estimate_ms": round(estimate_ms(), 3),
    }
    print(
        f"import {row['import_ms']} ms (limit 50), with the first estimate {row['import_and_first_estimate_ms']} ms, "
        f"a further estimate {row['estimate_ms']} ms (limit 1)"
    )
    print(json.dumps({**row, "python": platform.python_version(), "machine": platform.machine()}))
