"""Loading a saved quantized copy beside quantizing on the fly, and both beside plain `transformers`: seconds and bytes.

    python benchmarks/save_quantized.py                    # Qwen2.5-7B on a GPU, Qwen2.5-0.5B on the CPU
    python benchmarks/save_quantized.py --formats bf16 nf4 --repeat 1
    python benchmarks/save_quantized.py --model Qwen2.5-14B --folder /disk/with/45/GB --cold

Random bf16 weights of the published shape, which are removed at the end. Every load has a process of its own, which has
loaded and run the bundled model before, so that neither imports nor kernels are timed. Files are in the page cache, or
with --cold out of it. Prints one line of JSON for each kind of load as soon as it is measured, and a table at the end;
the last column is the share of the time that loading the 16-bit file with this library takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.tools.accuracy import make_checkpoint

WORK = {"prompt_len": 64, "max_new_tokens": 1}
PARTS = ("weights", "load_peak")
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"weights": "bf16"},
    "nf4": {"weights": "nf4"},
    "compact": {"weights": "nf4", "lm_head": "nf4", "embeddings": "host"},
    "int8": {"weights": "int8"},
}
# What transformers loads alike, and how.
PLAIN: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-7B" if torch.cuda.is_available() else "Qwen2.5-0.5B")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--cold", action="store_true", help="take files out of the page cache before every load")
    parser.add_argument("--repeat", type=int, default=3, help="loads of each kind; the fastest counts")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        checkpoint, knobs, out = options.child
        child(Path(checkpoint), json.loads(knobs), Path(out) if out else None)
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="qwen_vram_save_", dir=options.folder) as work:
        base = Path(work, "base")
        make_checkpoint(options.model, base)
        for name in options.formats:
            for row in loads_of(name, base, Path(work, name), options):
                facts = {"model": options.model, "cold": options.cold, "device": device(), "torch": torch.__version__}
                rows.append({"format": name, **row})
                print(json.dumps({**facts, **rows[-1], "date": date.today().isoformat()}), flush=True)
    show(rows)


def loads_of(name: str, base: Path, out: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each kind of load of a format."""
    knobs = FORMATS[name]
    fly = fastest(base, knobs, options)
    yield {"loads": "16-bit", **fly}
    if name in PLAIN:
        plain = fastest(base, {"by": "transformers", **knobs}, options)
        yield {"loads": "transformers", **plain, "share": plain["seconds"] / fly["seconds"]}
    if knobs["weights"] != "bf16":
        save = measure(base, knobs, out, cold=options.cold)
        copy = fastest(out, {"embeddings": knobs.get("embeddings", "device")}, options)
        yield {"loads": "copy", **copy, "share": copy["seconds"] / fly["seconds"], "saving_s": save["saving_s"]}


def fastest(checkpoint: Path, knobs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The fastest of some loads."""
    loads = [measure(checkpoint, knobs, None, cold=options.cold) for _ in range(options.repeat)]
    return min(loads, key=lambda row: row["seconds"])


def measure(checkpoint: Path, knobs: dict[str, Any], out: Path | None, *, cold: bool) -> dict[str, Any]:
    """One load in a fresh process, which saves what it loaded where `out` is given."""
    for path in checkpoint.glob("*.safetensors"):
        (forget if cold else read)(path)
    command = [sys.executable, __file__, "--child", str(checkpoint), json.dumps(knobs), str(out or "")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"loading {checkpoint} with {knobs} failed:\n{finished.stderr}")
    figures: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def read(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb") as file:
        while file.read(2**26):
            pass


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def child(checkpoint: Path, knobs: dict[str, Any], out: Path | None) -> None:
    """One load, its figures on standard output."""
    with qv.load(CHECKPOINT, profile="default", weights=knobs.get("weights", "nf4"), progress=False, **WORK) as llm:
        llm.probe()
    if knobs.pop("by", None):
        print(json.dumps(by_transformers(checkpoint, PLAIN[knobs["weights"]])))
        return
    began = time.monotonic()
    with qv.load(checkpoint, profile="default", progress=False, **WORK, **knobs) as llm:
        settle(llm.model)
        row: dict[str, Any] = {"seconds": time.monotonic() - began}
        measured, promised = llm.report().measured, llm.plan.estimate
        for part in PARTS:
            row |= {part: measured.get(part), f"predicted_{part}": getattr(promised, part)}
        if out is not None:
            row["saving_s"] = llm.save_quantized(out, progress=False).seconds
    print(json.dumps(row))


def by_transformers(checkpoint: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """The same load by `from_pretrained`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    where = 0 if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": where}}
    if quantization:
        compute = {"bnb_4bit_compute_dtype": torch.bfloat16} if "load_in_4bit" in quantization else {}
        options["quantization_config"] = BitsAndBytesConfig(**quantization, **compute)
    before = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    settle(model)
    row: dict[str, Any] = {"seconds": time.monotonic() - began}
    if torch.cuda.is_available():
        row |= {"weights": torch.cuda.memory_allocated() - before}
        row |= {"load_peak": torch.cuda.max_memory_allocated() - before}
    return row


def settle(model: torch.nn.Module) -> None:
    """Wait until all is loaded; files are mapped on the CPU, and read when they are first touched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return
    for tensor in model.state_dict().values():
        tensor.view(-1).view(torch.uint8)[::4096].sum()


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    print(f"{'format':9}{'loads':>14}{'seconds':>9}{'weights':>17}{'load peak':>17}{'predicted':>17}{'share':>8}")
    parts = ("weights", "load_peak", "predicted_load_peak")
    for row in rows:
        sizes = "".join(f"{'-' if row.get(part) is None else format(row[part], ','):>17}" for part in parts)
        share = f"{row['share']:.0%}" if "share" in row else ""
        print(f"{row['format']:9}{row['loads']:>14}{row['seconds']:>9.2f}{sizes}{share:>8}")


if __name__ == "__main__":
    main()
