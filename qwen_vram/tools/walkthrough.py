"""`qwen-vram demo`: estimate, load, ask and measure the bundled checkpoint, offline."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import CATEGORIES, examples

_QUESTION_SEED = 2026
_ARTICLE_MODEL = "Qwen/Qwen2.5-7B-Instruct"


def walk_through(console: Console) -> None:
    """Print the article's numbers, then estimate, load, ask and measure the bundled model in bf16 and in nf4."""
    _titled(console, f"{_ARTICLE_MODEL}: 512 + 512 tokens, batch 1", _article())
    _titled(console, "65-25-10, as the article says: batch 4, 25,600 tokens each, prefill in chunks of 4,096", _split())
    for weights in ("bf16", "nf4"):
        _load_and_ask(console, weights)


def _titled(console: Console, title: str, table: Table) -> None:
    """Print a table under a title; the title does not wrap to the width of the table."""
    console.print(f"\n{title}", style="bold", soft_wrap=True, highlight=False)
    console.print(table)


def _article() -> Table:
    """Return the article's headline figures, with the exact ones beside them."""
    ours = qv.estimate_vram(_ARTICLE_MODEL)
    thumb = qv.estimate_vram(None, params=7.62e9)
    table = Table()
    table.add_column("")
    table.add_column("article", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("GB (10^9)", justify="right")
    for label, claim, size in (
        ("weights, 7.62e9 x 2 bytes", "15.24 GB", thumb.weights),
        ("weights, every tensor", "15.2 GB", ours.weights),
        ("KV cache, 1,024 tokens", "~4.8 GB", ours.kv_cache),
        ("whole process", "~19.5 GB", ours.process_total),
    ):
        table.add_row(label, claim, f"{size:,}", f"{size / 10**9:.2f}")
    return table


def _split() -> Table:
    """Return a table of the 65-25-10 split, for the workload that has it."""
    full = qv.estimate_vram(_ARTICLE_MODEL, "default", **qv.FULL_CARD_WORKLOAD)  # type: ignore[arg-type]
    table = Table()
    for name in ("part", "GB (10^9)", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, share in full.shares().items():
        table.add_row(part, f"{full.parts()[part] / 10**9:.2f}", f"{share:.1%}")
    return table


def _load_and_ask(console: Console, weights: str) -> None:
    """Load the bundled model, ask one held-out question of each category, and print predicted and measured memory."""
    console.print(f"\nbundled model, {weights} weights", style="bold")
    before = qv.estimate_vram(CHECKPOINT, weights=weights, prompt_len=1024)
    parts = ", ".join(f"{part} {size:,}" for part, size in before.parts().items())
    console.print(f"  predicted bytes at 1,024 + 512 tokens: {parts}", markup=False, highlight=False, soft_wrap=True)
    with qv.load(CHECKPOINT, profile="default", weights=weights, prompt_len=1024, progress=False) as llm:
        for category in CATEGORIES:
            (example,) = examples(category, "held_out", seed=_QUESTION_SEED, count=1)
            answer = str(llm.chat(example.prompt, max_new_tokens=256, do_sample=False))
            mark = "[green]right[/green]" if answer == example.answer else "[red]wrong[/red]"
            console.print(f"  {category:8} {mark}", highlight=False)
            console.print(f"    Q: {_short(example.prompt)}", markup=False, highlight=False, soft_wrap=True)
            console.print(f"    A: {_short(answer)}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"\n{llm.report()}", markup=False, highlight=False, soft_wrap=True)


def _short(text: str, width: int = 88) -> str:
    """Return one line of a text. A long text is cut at its beginning, because the question is at its end."""
    line = " / ".join(part for part in text.splitlines() if part.strip())
    return line if len(line) <= width else "... " + line[-width:]
