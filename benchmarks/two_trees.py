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

# `ready` runs before the clock starts; each of `timed` has its own times.
CHILD = """
import json, os, resource, sys, time
sys.dont_write_bytecode = True
os.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
{ready}
found = []
for code in [compile(text, "timed", "exec") for text in {timed!r}]:
    started, used = time.perf_counter(), cpu()
    exec(code)
    used, took = cpu() - used, time.perf_counter() - started
    found.append([1000 * used, 1000 * took])
import qwen_vram
assert qwen_vram.__file__.startswith({tree!r}), qwen_vram.__file__
print(json.dumps(found))
"""


class Case(NamedTuple):
    """A process: statements before the clock starts, and those that are timed one after the other, by name."""

    ready: str
    timed: dict[str, str]


def cases(bundled: Path, large: Path) -> list[Case]:
    """Return an import, first estimates with it and after it, and later ones."""
    ask = {
        "bundled": f"qwen_vram.estimate_vram({str(bundled)!r})",
        "7B": f"qwen_vram.estimate_vram({str(large)!r})",
        "catalog": "qwen_vram.estimate_vram('Qwen2.5-7B-Instruct')",
    }
    found = [Case("pass", {"import": "import qwen_vram"})]
    for name, call in ask.items():
        found.append(Case("pass", {f"import and estimate, {name}": f"import qwen_vram; {call}"}))
        later = {
            f"estimate after imports, {name}": call,
            f"200 later estimates, {name}": f"for _ in range(200): {call}",
        }
        found.append(Case("import qwen_vram; qwen_vram.estimate_vram", later))
    return found


def loads(bundled: Path) -> list[Case]:
    """Return loads of the bundled checkpoint on the CPU, after the imports of torch and its users."""
    ready = "import torch, transformers, accelerate, bitsandbytes, qwen_vram; torch.set_num_threads(1); qwen_vram.load"
    ask = f"qwen_vram.load({str(bundled)!r}, device='cpu', progress=False, weights="
    names = ("bf16, first", "bf16, again", "nf4, first", "nf4, again")
    return [Case(ready, {f"load in {name}": f"{ask}{name.split(',')[0]!r})" for name in names})]


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


def run(tree: Path, case: Case, folder: Path) -> list[tuple[float, float]]:
    """Return the milliseconds of CPU and of wall-clock time of each timed statement, in a fresh process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "QWEN_VRAM"))}
    environment |= {"PYTHONPATH": str(tree), "QWEN_VRAM_CACHE": str(folder / "no machine"), "HF_HUB_OFFLINE": "1"}
    text = CHILD.format(ready=case.ready, timed=list(case.timed.values()), tree=str(tree))
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {', '.join(case.timed)} failed:\n{done.stderr[-2000:]}")
    return [(used, took) for used, took in json.loads(done.stdout.splitlines()[-1])]


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by a bootstrap with a fixed seed."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000 - 1]


def compare(before: Path, after: Path, case: Case, pairs: int, folder: Path) -> list[dict[str, object]]:
    """Return a row for each timed statement: medians of both trees, and their ratio with its interval."""
    for tree in (before, after):
        run(tree, case, folder)  # the first process reads the files from the disk
    measured = []
    for number in range(pairs):
        order = (before, after) if number % 2 else (after, before)
        times = {tree: run(tree, case, folder) for tree in order}
        measured.append((times[before], times[after]))
    found: list[dict[str, object]] = []
    for place, name in enumerate(case.timed):
        row: dict[str, object] = {"case": name, "pairs": pairs}
        for clock, label in enumerate(("cpu", "wall")):
            both = [(old[place][clock], new[place][clock]) for old, new in measured]
            ratios = [new / old for old, new in both]
            row[label] = {
                "before_ms": round(statistics.median(old for old, _ in both), 2),
                "after_ms": round(statistics.median(new for _, new in both), 2),
                "ratio": round(statistics.median(ratios), 3),
                "interval": [round(end, 3) for end in interval(ratios)],
            }
        found.append(row)
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
        for case in loads(bundled) if options.load else cases(bundled, large):
            if any(options.only in name for name in case.timed):
                for row in compare(trees[0], trees[1], case, options.pairs, folder):
                    print(json.dumps({**row, "python": platform.python_version()}), flush=True)


if __name__ == "__main__":
    main()
