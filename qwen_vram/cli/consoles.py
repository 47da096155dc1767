"""Where commands print: results on standard output, refusals on standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)
