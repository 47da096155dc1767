"""Merges that are killed: code for `python -c CODE FOLDER BASE ADAPTER SIGNAL=COUNT ...`, in a process of its own.

Every merge runs in a fork of this process, which has the libraries in memory and runs no threads, and is sent a signal
after a random, seeded time. Prints what was found after each, as a JSON object with a list for each signal.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import bitsandbytes.functional  # noqa: F401  (in memory before the first fork)
import rich.progress  # noqa: F401
import torch
from transformers import BitsAndBytesConfig

from qwen_vram.lora.merge import merge_lora_then_quantize


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and contents, the report apart, which holds the seconds that the merge took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "merge_report.json"}


def start(base: Path, adapter: Path, out: Path, quantize: str | None) -> int:
    """A fork that merges, overwriting what is there, and exits."""
    child = os.fork()
    if child:
        return child
    try:
        merge_lora_then_quantize(
            base, adapter, out, quantize=quantize, max_shard_size=2**20, overwrite=True, device="cpu", progress=False
        )
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    root, base, adapter = map(Path, sys.argv[1:4])
    torch.set_num_threads(2)
    BitsAndBytesConfig(load_in_4bit=True).to_dict()
    expected = {}
    took = {}
    for quantize in (None, "nf4"):
        began = time.monotonic()
        assert wait(start(base, adapter, root / "expected", quantize)) == 0
        took[quantize] = time.monotonic() - began
        expected[quantize] = files_of(root / "expected")
    untouched = files_of(base)
    outcomes: dict[str, list[dict[str, object]]] = {}
    for name, _, count in (word.partition("=") for word in sys.argv[4:]):
        outcomes[name] = []
        for seed in range(int(count)):
            rng = random.Random(seed)
            quantize = rng.choice([None, "nf4"])
            earlier = rng.random() < 0.5
            folder = root / f"{name} {seed}"
            folder.mkdir()
            out = folder / "out"
            if earlier:
                shutil.copytree(root / "expected", out)
            child = start(base, adapter, out, quantize)
            time.sleep(rng.uniform(0, took[quantize] * 1.1))
            os.kill(child, getattr(signal, name))
            code = wait(child)
            left = sorted(path.name for path in folder.iterdir())
            found = files_of(out) if out.exists() else None
            what = "nothing" if found is None else "new" if found == expected[quantize] else "broken"
            if earlier and found == files_of(root / "expected"):
                what = "earlier"
            began = time.monotonic()
            again = wait(start(base, adapter, out, quantize))
            took[quantize] = time.monotonic() - began  # what else runs on the machine comes and goes
            outcomes[name].append(
                {
                    "earlier": earlier,
                    "code": code,
                    "left": left,
                    "what": what,
                    "base": files_of(base) == untouched,
                    "again": again == 0 and files_of(out) == expected[quantize],
                    "clean": sorted(path.name for path in folder.iterdir()) == ["out"],
                }
            )
            shutil.rmtree(folder)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
