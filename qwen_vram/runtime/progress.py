"""Progress bars on standard error: ours over bytes, and those of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(label: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` bytes; give a function that any thread calls with the number of processed bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def transformers_bars(shown: bool) -> Iterator[Callable[..., Any]]:
    """Show or hide the bars of `transformers`; give its `tqdm`."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield logging.tqdm
    finally:
        (logging.enable_progress_bar if was_shown else logging.disable_progress_bar)()
