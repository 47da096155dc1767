"""`python -m tests.mutations`: put each fault into a copy of the code, and run the test that must find it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
PARTS = ("qwen_vram", "tests", "benchmarks", "docs", "examples", "pyproject.toml", "README.md", "Makefile")


def main() -> int:
    """Print a line for each fault; return 1 if one is not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mechanisms", nargs="*", help="parts of the names of mechanisms; all by default")
    parser.add_argument("--all", action="store_true", help="run all of `make test` on each fault, not its test alone")
    options = parser.parse_args()
    chosen = [one for one in MUTATIONS if not options.mechanisms or any(s in one.mechanism for s in options.mechanisms)]
    with tempfile.TemporaryDirectory(prefix="qwen_vram_mutations_") as folder:
        copy = Path(folder)
        for name in PARTS:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        outcomes = [report(mutation, copy, everything=options.all) for mutation in chosen]
    print(f"{outcomes.count(True)} of {len(outcomes)} found")
    return 0 if all(outcomes) else 1


def report(mutation: Mutation, copy: Path, *, everything: bool) -> bool:
    """Put the fault in, run the tests, and take it out again; tell if a test failed that passes without the fault."""
    file = copy / "qwen_vram" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        print(
            f"does not apply | {mutation.mechanism} | {mutation.file} has the old text {text.count(mutation.old)} times"
        )
        return False
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    began = time.monotonic()
    try:
        ended = run_tests(copy, [] if everything else [mutation.test])
    finally:
        file.write_text(text, encoding="utf-8")
    seconds = time.monotonic() - began
    failed = next((line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    test = failed.partition(" ")[2].partition(" - ")[0]
    word = "found" if ended.returncode == 1 else "NOT FOUND" if ended.returncode == 0 else "pytest did not run"
    if word == "found" and run_tests(copy, [test]).returncode != 0:
        word = "FAILS WITHOUT THE FAULT"
    print(f"{word} | {mutation.mechanism} | {seconds:.0f} s | {test}", flush=True)
    return word == "found"


def run_tests(copy: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pytest in the copy until the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not full", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    raise SystemExit(main())
