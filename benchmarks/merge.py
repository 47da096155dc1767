"""Peak memory and speed of `merge_lora_then_quantize`, beside PEFT's merge and a plain copy of the same files.

    python benchmarks/merge.py /path/with/40/GB            # the full 7B shape
    python benchmarks/merge.py /tmp/bench --layers 2       # a cut of it, which PEFT can run too
    python benchmarks/merge.py /path --device cuda         # ours computes on the GPU

Makes a checkpoint of random bf16 weights in the shape of Qwen2.5-7B and a rank-64 adapter on all its linear layers in
the folder given, and removes what it made. Every run is a fresh process, with the files out of the page cache. The disk
of a virtual machine varies, so the runs take turns for several rounds, and the median in seconds of each is kept.
Prints a table and one line of JSON, with the seconds of every round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LAYERS = 28
RANK = 64
HIDDEN, INNER, VOCAB, HEADS, KV_HEADS = 3584, 18944, 152064, 28, 4
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (512, HIDDEN),
    "self_attn.v_proj": (512, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def make_base(folder: Path, layers: int) -> None:
    """A checkpoint of random weights, a shard for each layer, never more than one table in memory."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    pool = torch.randn(2**25).mul_(0.02).bfloat16()

    def weights(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        start = int(torch.randint(len(pool), ()))
        return pool.roll(start).repeat(-(-count // len(pool)))[:count].view(shape)

    folder.mkdir(parents=True)
    shards = [
        {"model.embed_tokens.weight": (VOCAB, HIDDEN)},
        *(layer_shapes(layer) for layer in range(layers)),
        {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)},
    ]
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: weights(*shape) for name, shape in shapes.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": shape for name, shape in LINEAR.items()}
    shapes |= {f"{prefix}{name}.bias": LINEAR[name][:1] for name in BIASED}
    return shapes | {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}


def make_adapter(folder: Path, layers: int) -> None:
    """A rank-64 adapter on all linear layers in float32, as PEFT saves it; its update is about 2 % of the weights."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEAR.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns).mul_(0.01)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK).mul_(0.0025)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [name.rpartition(".")[2] for name in LINEAR],
        "base_model_name_or_path": "benchmark",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


class PeakMemory(threading.Thread):
    """Samples this process's anonymous memory every 5 ms; the kernel itself keeps the peak of the resident set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = 0
        self.start()

    def run(self) -> None:
        """Until the process ends."""
        while True:
            self.anonymous = max(self.anonymous, status("RssAnon"))
            time.sleep(0.005)


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run_ours(base: Path, adapter: Path, out: Path, quantize: str | None, device: str) -> None:
    from qwen_vram.lora.merge import merge_lora_then_quantize

    merge_lora_then_quantize(base, adapter, out, quantize=quantize, device=device, progress=False)  # type: ignore[arg-type]


def run_peft(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter)
    model.merge_and_unload().save_pretrained(out)


def run_copy(base: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, out / path.name)
    for path in out.iterdir():
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache, so that every run reads the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def child(what: str, base: Path, adapter: Path, out: Path, device: str) -> None:
    """One run, its figures on standard output. Imports and the GPU's context are not timed, because a copy has none."""
    ours = what not in ("copy", "peft")
    if what != "copy":
        import torch

        if ours and device == "cuda":
            torch.ones(1, device=device)
    if what == "peft":
        import peft  # noqa: F401
    if what not in ("copy", "16-bit", "peft"):
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig  # noqa: F401
    peak = PeakMemory()
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    if what == "copy":
        run_copy(base, out)
    elif what == "peft":
        run_peft(base, adapter, out)
        for path in out.iterdir():
            sync(path)
    else:
        run_ours(base, adapter, out, None if what == "16-bit" else what, device)
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "peak_anonymous": peak.anonymous,
        "peak_resident": status("VmHWM"),
        "peak_gpu": torch.cuda.max_memory_allocated() if ours and device == "cuda" else 0,
    }
    print(json.dumps(figures))


def measure(what: str, base: Path, adapter: Path, root: Path, device: str) -> dict[str, float]:
    """One run in a fresh process."""
    for folder in (base, adapter):
        forget(folder)
    out = root / f"out-{what}"
    command = [sys.executable, __file__, str(root), "--child", what, str(base), str(adapter), str(out)]
    command += ["--device", device]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{what} failed:\n{finished.stderr}")
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    figures["written"] = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    return figures


def median(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The run in the middle by its seconds, with those of all runs."""
    middle = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
    return {**middle, "all_seconds": [row["seconds"] for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to work; 40 GB for the full shape")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--runs", nargs="+", default=None, help="of copy, 16-bit, peft, nf4 and other formats")
    parser.add_argument("--rounds", type=int, default=3, help="odd")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where ours computes")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, *paths = options.child
        child(what, *map(Path, paths), options.device)
        return
    runs = options.runs or ["copy", "16-bit", "nf4", *(["peft"] if options.layers < LAYERS else [])]
    root = options.folder / f"merge-benchmark-{os.getpid()}"
    try:
        make_base(root / "base", options.layers)
        make_adapter(root / "adapter", options.layers)
        base_bytes = sum(path.stat().st_size for path in (root / "base").iterdir())
        rounds = [
            {what: measure(what, root / "base", root / "adapter", root, options.device) for what in runs}
            for _ in range(options.rounds)
        ]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    results = {what: median([one[what] for one in rounds]) for what in runs}
    print(f"{options.layers} layers, base {base_bytes / 1e9:.2f} GB, rank {RANK} on all linear layers")
    memory = f"{'peak anonymous':>16}{'peak resident':>15}{'peak GPU':>10}"
    print(f"{'':8}{'seconds':>9}{'CPU':>7}{'of base/s':>12}{'written':>10}{memory}")
    for what, row in results.items():
        rate = base_bytes / row["seconds"] / 1e9
        print(
            f"{what:8}{row['seconds']:>9.1f}{row['cpu_seconds']:>7.1f}{rate:>7.2f} GB/s{row['written'] / 1e9:>7.2f} GB"
            f"{row['peak_anonymous'] / 1e9:>13.2f} GB{row['peak_resident'] / 1e9:>12.2f} GB"
            f"{row['peak_gpu'] / 1e9:>7.2f} GB"
        )
    print(json.dumps({"layers": options.layers, "device": options.device, "base_bytes": base_bytes, "runs": results}))


if __name__ == "__main__":
    main()
