"""Sessions on small cards: 25 turns in one process, held against what the plan promised after every turn.

    python benchmarks/sessions.py OUT.jsonl [--jobs 6] [--seconds 500]

A session is a model, a cap of 2 to 16 GiB, a profile or the planner's choice, knobs, an adapter or none. Its turns
have random lengths and batches within the plan, sampling, or two beams. Streams are left early, a logits processor
raises an error, and requests go over the plan. The planned maximum runs at the start, in the middle and at the end.
torch's memory fraction makes the GPU a card of the cap's size. Every session has a process of its own. Sessions that
are in OUT.jsonl already are not run again. Random weights of the published shapes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from caps import GIB, limit, load_kernels, read
from transformers import LogitsProcessor, LogitsProcessorList

import qwen_vram as qv
from qwen_vram.runtime.measure import process_bytes
from qwen_vram.tools.accuracy import make_checkpoint
from qwen_vram.tools.fresh_process import call_each

TURNS = 25
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen3-4B")
CAPS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
PROFILES = ("auto", "auto", "auto", "compact", "int4-flash", "split-kv", "tiny", "speed", "default")
KNOBS: dict[str, tuple[object, ...]] = {
    "weights": ("bf16", "nf4", "int8", "int4", "fp8", "fp4"),
    "kv_cache": ("int8", "int4"),
    "kv_device": ("host",),
    "embeddings": ("host",),
    "prefill_chunk_size": (256, 512, 1_000, 2_048),
}


class PlannedError(Exception):
    """The error that a turn's logits processor raises."""


class Raise(LogitsProcessor):  # type: ignore[misc]
    """Raises at the third token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are, twice."""
        self.calls += 1
        if self.calls == 3:
            raise PlannedError
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=40, help="sessions")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="only sessions of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no session after this time")
    parser.add_argument("--jobs", type=int, default=1, help="sessions at a time; the GPU must hold them together")
    options = parser.parse_args()
    done = read(options.out)
    wanted = [cell for cell in sessions(options.count) if cell["model"] in options.models]
    missing = [cell for cell in wanted if json.dumps(cell, sort_keys=True) not in done]
    end = time.monotonic() + options.seconds
    for model, group in groupby(missing, key=lambda cell: cell["model"]):
        if time.monotonic() > end:
            break
        with tempfile.TemporaryDirectory(prefix="qwen_vram_sessions_") as folder:
            for made in call_each(partial(make_files, folder=folder), [model]):
                if made.error:
                    raise SystemExit(made.error)
            for ended in call_each(partial(run_session, folder, end), group, jobs=options.jobs):
                if ended.error:
                    print(f"{ended.item} failed:\n{ended.error[-3000:]}", file=sys.stderr, flush=True)
                elif ended.value:
                    with options.out.open("a") as file:
                        file.write(json.dumps(ended.value) + "\n")
                    show(ended.value)
    summary(options.out)


def sessions(count: int) -> Iterator[dict[str, Any]]:
    """Yield the sessions by model; the same ones in every run."""
    rng = random.Random(19)
    cells = []
    for seed in range(count):
        profile = rng.choice(PROFILES)
        share = 0.0 if profile == "speed" else 0.25
        knobs = {name: rng.choice(values) for name, values in KNOBS.items() if rng.random() < share}
        if knobs.get("kv_device") == "host":
            knobs["kv_cache"] = "bf16"
        if profile == "default":
            knobs = {name: value for name, value in knobs.items() if not name.startswith("kv_")}
        cells.append(
            {
                "seed": seed,
                "model": MODELS[seed % len(MODELS)],
                "profile": profile,
                "knobs": knobs,
                "cap": rng.choice(CAPS) * GIB,
                "adapter": profile != "speed" and rng.random() < 0.2,
                "prompt_len": int(200 * 40 ** rng.random()),
                "max_new_tokens": rng.randint(8, 40),
                "batch_size": rng.choice((1, 1, 2, 4)),
            }
        )
    yield from sorted(cells, key=lambda cell: str(cell["model"]))


def make_files(model: str, folder: str) -> None:
    """Write a checkpoint, and a LoRA adapter for it, into `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    make_checkpoint(model, base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tuned = get_peft_model(plain, LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    tuned.save_pretrained(adapter)


def run_session(folder: str, end: float, cell: dict[str, Any]) -> dict[str, Any] | None:
    """Run a session in this process and return its row; `None` past `end`."""
    if time.monotonic() > end:
        return None
    work = {name: cell[name] for name in ("prompt_len", "max_new_tokens", "batch_size")}
    asked = {"profile": cell["profile"], **work, **cell["knobs"], "padded": cell["batch_size"] > 1}
    if cell["adapter"]:
        asked["adapter"] = f"{folder}/adapter"
    base, cap = f"{folder}/base", cell["cap"]
    row: dict[str, Any] = {"cell": cell, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    row["date"] = date.today().isoformat()
    plan = None
    caps = [cell["cap"], *(size * GIB for size in CAPS if size * GIB > cell["cap"])]
    if cell["profile"] != "auto":  # nothing is searched: the plan for the largest card needs as much as the others
        try:
            need = qv.plan(base, vram=caps[-1], **asked).estimate.needed_bytes
        except qv.QwenVramError as error:
            return {**row, "refused": str(error)}
        caps = [size for size in caps if size >= need]
    for cap in caps:
        try:
            plan = qv.plan(base, vram=cap, **asked)
            break
        except qv.DoesNotFitError:
            continue
        except qv.QwenVramError as error:
            return {**row, "refused": str(error)}
    if plan is None:
        return {**row, "refused": "no cap holds it"}
    load_kernels(plan.profile.weights)
    limit(cap)
    with qv.load(base, vram=cap, **asked, progress=False) as llm:
        session = Session(llm, cell)
        turns = [session.turn(number) for number in range(TURNS)]
        row |= {"cap": cap, "promised": llm.plan.estimate.process_total, "call": llm.plan.call}
    return {**row, "turns": turns}


class Session:
    """One loaded model and what its turns ask of it."""

    def __init__(self, llm: qv.LoadedModel, cell: dict[str, Any]) -> None:
        self.llm, self.cell, self.rng = llm, cell, random.Random(cell["seed"])
        self.new = cell["max_new_tokens"]
        vocabulary = llm.tokenizer.get_vocab()
        self.words = [word.replace("Ġ", " ") for word in vocabulary if word[0] == "Ġ" and word[1:].isalpha()]
        self.fixed = self.text(min(64, cell["prompt_len"]))
        self.first_answer: str | None = None

    def text(self, tokens: int) -> str:
        """Return a prompt of that many tokens: each word with its blank is one."""
        return "".join(self.rng.choices(self.words, k=tokens))

    def turn(self, number: int) -> dict[str, Any]:
        """Run one turn and say what happened and what the process takes after it."""
        kind = "maximum" if number in (0, TURNS // 2, TURNS - 1) else self.rng.choice(tuple(self.kinds()))
        began, row = time.monotonic(), {"turn": number, "kind": kind}
        try:
            row["result"] = self.kinds()[kind]() or "ran"
        except torch.cuda.OutOfMemoryError as error:
            row["result"] = f"out of memory: {error}"
        taken = process_bytes(self.llm.device)
        reserved = torch.cuda.memory_reserved(self.llm.device)
        return {**row, "process_total": taken, "reserved": reserved, "seconds": round(time.monotonic() - began, 3)}

    def kinds(self) -> dict[str, Callable[[], str | None]]:
        """Return every kind of turn by its name."""
        found = {
            "maximum": self.maximum,
            "greedy": self.greedy,
            "sampled": self.sampled,
            "repeated": self.repeated,
            "left early": self.left_early,
            "exception": self.exception,
            "over the plan": self.over_the_plan,
        }
        if self.cell["batch_size"] > 1 and self.cell["profile"] != "speed":
            found["beams"] = self.beams
        return found

    def generate(self, lengths: list[int], **options: Any) -> None:
        """Generate from prompts of those lengths, to the last token."""
        new = options.pop("max_new_tokens", self.new)
        prompts = [self.text(length) for length in lengths]
        self.llm.generate(prompts, max_new_tokens=new, min_new_tokens=new, **{"do_sample": False, **options})

    def lengths(self) -> list[int]:
        """Return random lengths of a batch within the plan."""
        batch = self.rng.randint(1, self.cell["batch_size"])
        return [self.rng.randint(1, self.cell["prompt_len"]) for _ in range(batch)]

    def maximum(self) -> None:
        """Run the planned workload."""
        self.generate([self.cell["prompt_len"]] * self.cell["batch_size"])

    def greedy(self) -> None:
        """Run a smaller workload."""
        self.generate(self.lengths(), max_new_tokens=self.rng.randint(1, self.new))

    def sampled(self) -> None:
        """Run a smaller workload with sampling."""
        self.generate(self.lengths(), do_sample=True, temperature=0.8, top_p=0.9, top_k=50)

    def beams(self) -> None:
        """Run one prompt with two beams."""
        self.generate([self.rng.randint(1, self.cell["prompt_len"])], num_beams=2)

    def repeated(self) -> str:
        """Ask the same question again."""
        answer = self.llm.generate(self.fixed, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert isinstance(answer, str)
        self.first_answer = self.first_answer or answer
        return "same" if answer == self.first_answer else f"differs: {answer!r}, first {self.first_answer!r}"

    def left_early(self) -> None:
        """Leave a stream after three pieces."""
        for pieces, _ in enumerate(self.llm.stream(self.text(self.cell["prompt_len"] // 2), min_new_tokens=8)):
            if pieces == 2:
                break

    def exception(self) -> str:
        """Run into an error of the caller."""
        with suppress(PlannedError):
            self.generate(self.lengths()[:1], max_new_tokens=8, logits_processor=LogitsProcessorList([Raise()]))
            return "no exception"
        return "raised"

    def over_the_plan(self) -> str:
        """Ask for more than was planned."""
        length = min(8 * self.cell["prompt_len"] + 8_000, self.llm.model.config.max_position_embeddings - 5)
        try:
            self.generate([length], max_new_tokens=4)
        except (qv.DoesNotFitError, qv.WorkloadError):
            return "refused"
        return "fitted all the same"


def show(row: dict[str, Any]) -> None:
    """Print one line for a session."""
    cell = row["cell"]
    if "refused" in row:
        print(f"{cell['seed']:2} {cell['model']} refused: {row['refused'][:150]}", flush=True)
        return
    highest = max(turn["process_total"] or 0 for turn in row["turns"])
    print(
        f"{cell['seed']:2} {cell['model']} {cell['profile']} {cell['knobs']} cap {row['cap'] / GIB:.0f} GiB: promised "
        f"{row['promised'] / 1e6:,.0f} MB, most {highest / 1e6:,.0f} MB; {faults(row) or 'held'}",
        flush=True,
    )


def faults(row: dict[str, Any]) -> list[str]:
    """Return what broke the promise, turn by turn."""
    found = []
    for turn in row["turns"]:
        if turn["result"].startswith(("out of memory", "differs", "no exception")):
            found.append(f"turn {turn['turn']} ({turn['kind']}): {turn['result'][:300]}")
        if (turn["process_total"] or 0) > row["promised"]:
            over = (turn["process_total"] - row["promised"]) / 1e6
            found.append(f"turn {turn['turn']} ({turn['kind']}): {over:,.1f} MB over the promise")
    return found


def summary(out: Path) -> None:
    """Print how many sessions held."""
    rows = list(read(out).values())
    ran = [row for row in rows if "turns" in row]
    held = [row for row in ran if not faults(row)]
    turns = sum(len(row["turns"]) for row in ran)
    print(f"{len(rows)} sessions, {len(rows) - len(ran)} refused, {len(ran)} ran {turns} turns, {len(held)} held")


if __name__ == "__main__":
    main()
