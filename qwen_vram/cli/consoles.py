"""Consoles of the commands: results on standard output, errors on standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)
