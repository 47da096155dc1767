"""Metrics for Prometheus: requests, tokens, queue, and memory predicted beside measured.

The format has three kinds of lines, so no library writes it.
Source: https://prometheus.io/docs/instrumenting/exposition_formats/, "Text-based format".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import Any

import psutil

from qwen_vram.serving.engine.interface import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the classes of request times, in seconds.
_BOUNDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_STATES = ("loading", "ready", "stopping", "failed")
Labels = Mapping[str, str]


class Metrics:
    """Counters of a server. Any thread may count."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._classes: Counter[float] = Counter()
        self._seconds = 0.0
        self._count = 0

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        with self._lock:
            self._requests[path, status] += 1
            if not path.startswith("/v1/"):
                return
            self._seconds += seconds
            self._count += 1
            for bound in _BOUNDS:
                self._classes[bound] += seconds <= bound

    def tokens(self, prompt: int, generated: int) -> None:
        """Count the tokens of a request that ran."""
        with self._lock:
            self._tokens["prompt"] += prompt
            self._tokens["generated"] += generated

    def text(self, engine: Engine) -> str:
        """Return all metrics in Prometheus' text format."""
        return "\n".join(self._lines(engine)) + "\n"

    def request_lines(self) -> Iterator[str]:
        """Yield the lines of the requests that are over: their number, and a histogram of their times."""
        with self._lock:
            requests = dict(self._requests)
            classes, seconds, count = dict(self._classes), self._seconds, self._count
        rows = [({"path": path, "status": str(status)}, n) for (path, status), n in sorted(requests.items())]
        yield from metric_lines("requests_total", "counter", "Requests by path and status.", rows)
        name = "request_seconds"
        yield from _head(name, "histogram", "Times of requests to /v1/, from their first byte to their last.")
        for bound in _BOUNDS:
            yield _line(f"{name}_bucket", {"le": f"{bound:g}"}, classes.get(bound, 0))
        yield _line(f"{name}_bucket", {"le": "+Inf"}, count)
        yield _line(f"{name}_sum", {}, seconds)
        yield _line(f"{name}_count", {}, count)

    def _lines(self, engine: Engine) -> Iterator[str]:
        yield from self.request_lines()
        with self._lock:
            tokens = dict(self._tokens)
        rows = [({"kind": kind}, tokens.get(kind, 0)) for kind in ("prompt", "generated")]
        yield from metric_lines("tokens_total", "counter", "Tokens of requests that ran.", rows)
        yield from metric_lines("requests_waiting", "gauge", "Requests in the queue.", [({}, len(engine.queue))])
        yield from metric_lines(
            "requests_waiting_limit", "gauge", "The most requests in the queue.", [({}, engine.queue.most)]
        )
        yield from metric_lines("requests_running", "gauge", "Requests that run now.", [({}, engine.running())])
        yield from metric_lines(
            "requests_running_limit", "gauge", "The most answers that run at once.", [({}, engine.queue.places)]
        )
        yield from state_lines(engine.state()[0])
        yield from metric_lines(
            "process_resident_bytes",
            "gauge",
            "Resident set of the server's process.",
            [({}, psutil.Process(os.getpid()).memory_info().rss)],
        )
        memory = list(_memory(engine.report()))
        yield from metric_lines("memory_bytes", "gauge", "Memory by part, of the last generation or the load.", memory)


def _memory(report: Mapping[str, Any], device: str = "") -> Iterator[tuple[Labels, int]]:
    """Yield labels and bytes of each part, predicted and measured; parts that are not measured are left out."""
    where = {"device": device} if device else {}
    for part, sizes in report.items():
        if not isinstance(sizes, Mapping) or "predicted" not in sizes:
            continue
        for kind in ("predicted", "measured"):
            if isinstance(sizes.get(kind), int):
                yield {"part": part, "kind": kind, **where}, sizes[kind]
    for number, one in report.get("devices", {}).items():
        yield from _memory(one, str(number))


def state_lines(now: str) -> Iterator[str]:
    """Yield the lines of a server's state, as `/health` states it."""
    rows = [({"state": state}, int(state == now)) for state in _STATES]
    yield from metric_lines("state", "gauge", "1 for the state of the server.", rows)


def metric_lines(name: str, kind: str, words: str, rows: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    """Yield the lines of a metric: what it is, and a value for each set of labels."""
    yield from _head(name, kind, words)
    for labels, value in rows:
        yield _line(name, labels, value)


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP qwen_vram_{name} {words}"
    yield f"# TYPE qwen_vram_{name} {kind}"


def _line(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"qwen_vram_{name}{f'{{{inner}}}' if inner else ''} {value}"
