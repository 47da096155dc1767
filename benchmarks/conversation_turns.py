"""Seconds of each turn of a growing conversation: with its cache, and with the whole history fed by `chat`.

Usage: python benchmarks/conversation_turns.py [MODEL] [--turns 12] [--set KNOB=VALUE ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import examples

REPEATS = 3
GREEDY = {"do_sample": False, "max_new_tokens": 32}


def main() -> None:
    """Ask questions about tables in one conversation, then ask `chat` for the same answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(CHECKPOINT))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE")
    given = parser.parse_args()
    knobs = {"attention": "fused", "cache": "preallocated", **dict(one.split("=", 1) for one in given.set)}
    asked = [one.prompt for one in examples("table", "held_out", seed=11, count=given.turns)]
    with qv.load(given.model, profile="default", prompt_len=3_500, max_new_tokens=100, progress=False, **knobs) as llm:
        fed: list[int] = []
        llm.model.register_forward_pre_hook(
            lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        llm.chat("What is 12 + 30?", **GREEDY)  # the first generation of a process takes longer
        turns, rows = [], []
        for _ in range(REPEATS):
            with llm.conversation(**GREEDY) as chat:
                for turn, question in enumerate(asked):
                    turns.append((turn, *measured(fed, lambda text=question: chat.say(text))))
            messages = chat.messages
        for _ in range(REPEATS):
            for turn in range(len(asked)):
                history = messages[: 2 * turn + 1]
                rows.append((turn, *measured(fed, lambda whole=history: llm.chat(whole, **GREEDY))))
        print(f"{llm!r}, {torch.get_num_threads()} threads, torch {torch.__version__}, best of {REPEATS}")
        print("turn   fed by say   seconds   fed by chat   seconds   same answer")
        for turn in range(len(asked)):
            said, whole = (min(row[1:] for row in of if row[0] == turn) for of in (turns, rows))
            same = "yes" if said[2] == whole[2] else "no"
            print(f"{turn + 1:>4} {said[1]:>12,} {said[0]:>9.2f} {whole[1]:>13,} {whole[0]:>9.2f}   {same}")


def measured(fed: list[int], call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Return the seconds of a call, the tokens of its first forward pass, and its result."""
    fed.clear()
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, fed[0], result


if __name__ == "__main__":
    main()
