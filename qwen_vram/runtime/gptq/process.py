"""The separate process of GPTQModel: its environment, progress and log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_vram.errors import QuantizationFailedError

_WORKER = "qwen_vram.runtime.gptq.worker"
_LOG_LINES = 20
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_worker(job: Mapping[str, Any], work: Path, layer_done: Callable[[], None]) -> None:
    """Run the worker on `job`, with its files in `work`; call `layer_done` for every layer.

    Raises:
        QuantizationFailedError: it did not finish successfully.
    """
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = work / "log.txt"
    reading, writing = os.pipe()
    with os.fdopen(reading) as lines, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, "job.json", str(writing)],
            stdin=subprocess.PIPE,  # the worker ends when this end is closed, also if this process is killed
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
            cwd=work,
            env=_environment(work),
        )
        os.close(writing)
        try:
            for _ in lines:
                layer_done()
            status = process.wait()
        finally:
            process.kill()
            process.communicate()
    if status != 0:
        tail = _tail(log)
        raise QuantizationFailedError(
            f"GPTQModel ended with exit status {status}, and nothing was written; the end of its log:\n{tail}",
            returncode=status,
            log=tail,
        )


def _environment(work: Path) -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    settings = {
        # It does not start with fewer than 2, its default on hosts with 2 processors. Source: GPTQModel 7.6.0.
        "GPTQMODEL_CPU_WORKERS": str(max(2, (os.cpu_count() or 1) // 2)),
        "LOGBAR_ANIMATION": "0",
    }
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hub"),  # always created, by default in /tmp
        "TMPDIR": str(work),
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    return {**settings, **os.environ, **fixed}


def _tail(log: Path) -> str:
    text = _CONTROL.sub("", log.read_text(encoding="utf-8", errors="replace")).replace("\r", "\n")
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-_LOG_LINES:])
