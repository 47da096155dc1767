"""Cost of imports, estimates and loads in two trees of this repository, measured in pairs of fresh processes.

Usage: python benchmarks/two_trees.py BEFORE AFTER [--pairs 40] [--only CASE] [--load]

BEFORE and AFTER are folders with a `qwen_vram` package, such as two worktrees. The two take turns, and each pair begins
with the other one. Every process runs on one core, and compiled byte code is made first. Times are those of the call
alone, by the process itself. The interval of the median ratio AFTER / BEFORE is a bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 4
RESAMPLES = 4_000

# `ready` runs before the clock starts, `measured` is timed.
CHILD = """
import json, os, resource, sys, time
sys.dont_write_bytecode = True
os.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
{ready}
started, used = time.perf_counter(), cpu()
{measured}
used, took = cpu() - used, time.perf_counter() - started
import qwen_vram
assert qwen_vram.__file__.startswith({tree!r}), qwen_vram.__file__
print(json.dumps([1000 * used, 1000 * took]))
"""


class Case(NamedTuple):
    """Statements before the clock starts, and those that are timed."""

    ready: str
    measured: str


def cases(bundled: Path, large: Path) -> dict[str, Case]:
    """Return the cases by name: an import, first estimates with and without it, and later ones."""
    ask = {
        "bundled": f"qwen_vram.estimate_vram({str(bundled)!r})",
        "7B": f"qwen_vram.estimate_vram({str(large)!r})",
        "catalog": "qwen_vram.estimate_vram('Qwen2.5-7B-Instruct')",
    }
    found = {"import": Case("pass", "import qwen_vram")}
    for name, call in ask.items():
        found[f"import and estimate, {name}"] = Case("pass", f"import qwen_vram; {call}")
        found[f"estimate after imports, {name}"] = Case("import qwen_vram; qwen_vram.estimate_vram", call)
        repeated = f"for _ in range(200): {call}"
        found[f"200 later estimates, {name}"] = Case(f"import qwen_vram; {call}", repeated)
    return found


def loads(bundled: Path) -> dict[str, Case]:
    """Return loads of the bundled checkpoint on the CPU, after the imports of torch and its users."""
    ready = "import torch, transformers, accelerate, bitsandbytes, qwen_vram; torch.set_num_threads(1); qwen_vram.load"
    ask = f"llm = qwen_vram.load({str(bundled)!r}, device='cpu', progress=False, weights="
    found = {}
    for weights in ("bf16", "nf4"):
        found[f"first load, {weights}"] = Case(ready, f"{ask}{weights!r})")
        found[f"second load, {weights}"] = Case(f"{ready}; {ask}{weights!r})", f"{ask}{weights!r})")
    return found


def make_7b(folder: Path) -> None:
    """Write the config.json, index and headers of Qwen2.5-7B in four shards, whose data are holes."""
    from qwen_vram.spec.architecture import Architecture
    from qwen_vram.spec.catalog import catalog_row

    row = catalog_row("Qwen2.5-7B-Instruct")
    assert row is not None
    config = {
        **row.shape._asdict(),
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": row.max_position_embeddings,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = list(Architecture.from_config(config).weights())
    per_shard = -(-len(weights) // SHARDS)
    index = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header, end = {}, 0
        for weight in weights[number * per_shard : (number + 1) * per_shard]:
            nbytes = 2 * weight.numel
            header[weight.name] = {
                "dtype": "BF16",
                "shape": list(weight.shape),
                "data_offsets": [end, end + nbytes],
            }
            index[weight.name] = name
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))


def run(tree: Path, case: Case, folder: Path) -> tuple[float, float]:
    """Return the milliseconds of CPU and of wall-clock time that a case takes in a fresh process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "QWEN_VRAM"))}
    environment |= {"PYTHONPATH": str(tree), "QWEN_VRAM_CACHE": str(folder / "no machine"), "HF_HUB_OFFLINE": "1"}
    text = CHILD.format(ready=case.ready, measured=case.measured, tree=str(tree))
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {case.measured!r} failed:\n{done.stderr[-2000:]}")
    used, took = json.loads(done.stdout.splitlines()[-1])
    return used, took


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by a bootstrap with a fixed seed."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000 - 1]


def compare(before: Path, after: Path, case: Case, pairs: int, folder: Path) -> dict[str, object]:
    """Return the medians of both trees and the ratio with its interval, of CPU and wall-clock time."""
    for tree in (before, after):
        run(tree, case, folder)  # the first process reads the files from the disk
    rows: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(pairs):
        order = (before, after) if number % 2 else (after, before)
        times = {tree: run(tree, case, folder) for tree in order}
        rows.append((times[before], times[after]))
    found: dict[str, object] = {"pairs": pairs}
    for place, clock in enumerate(("cpu", "wall")):
        ratios = [new[place] / old[place] for old, new in rows]
        found[clock] = {
            "before_ms": round(statistics.median(old[place] for old, _ in rows), 2),
            "after_ms": round(statistics.median(new[place] for _, new in rows), 2),
            "ratio": round(statistics.median(ratios), 3),
            "interval": [round(end, 3) for end in interval(ratios)],
        }
    return found


def main() -> None:
    """Measure every case, and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the earlier tree")
    parser.add_argument("after", type=Path, help="folder of the later tree")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    parser.add_argument("--load", action="store_true", help="measure loads on the CPU, which take seconds each")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    trees = [options.before.resolve(), options.after.resolve()]
    for tree in trees:
        if not (tree / "qwen_vram" / "__init__.py").is_file():
            parser.error(f"{str(tree)!r} holds no package qwen_vram; give the folder of a worktree")
        compileall.compile_dir(tree / "qwen_vram", quiet=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = folder / "7B"
        large.mkdir()
        make_7b(large)
        bundled = ROOT / "qwen_vram" / "demo" / "checkpoint"
        for text, case in (loads(bundled) if options.load else cases(bundled, large)).items():
            if options.only in text:
                found = compare(trees[0], trees[1], case, options.pairs, folder)
                print(json.dumps({"case": text, **found, "python": platform.python_version()}), flush=True)


if __name__ == "__main__":
    main()
