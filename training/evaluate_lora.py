"""What each way of merging leaves of the demo adapter: held-out answers before, with the adapter, and after merging.

    python -m training.evaluate_lora qwen_vram/demo/adapter

Beside the new skill it examines the five categories that the base learned, so that forgetting shows. The models are
loaded by plain transformers and PEFT; only the merged folders are written by `merge_lora_then_quantize`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import CATEGORIES, SKILL, examples
from qwen_vram.lora.fidelity import Proof
from qwen_vram.lora.merge import merge_lora_then_quantize
from training.evaluate import COUNT, SEED, answer, share
from training.lora import relative_sizes, updates

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)

SIZE_EDGES = (0.0, 0.03, 0.04, 0.05, 0.1, 1.0)
"""Bounds of the ranges of relative size that `kept` is shown for."""

MERGED = ("merged, bf16", "merged and quantized, nf4", "PEFT's merge into nf4")


def load(folder: Path, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Load a checkpoint in bf16, or with `quantization`; a checkpoint that is quantized already says so itself."""
    if quantization:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def ways(base: Path, adapter: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Each way of running the adapter: its name, and what loads the model."""
    yield "base alone, bf16", lambda: load(base)
    yield "adapter not merged (PEFT), bf16", lambda: PeftModel.from_pretrained(load(base), adapter)
    ours, ours_nf4, peft_nf4 = MERGED
    yield ours, lambda: merged(base, adapter, scratch, None)
    yield ours_nf4, lambda: merged(base, adapter, scratch, "nf4")
    yield peft_nf4, lambda: PeftModel.from_pretrained(load(base, NF4), adapter).merge_and_unload()


def merged(base: Path, adapter: Path, scratch: Path, quantize: str | None) -> PreTrainedModel:
    """Merge with this library into a new folder, and load that."""
    out = scratch / str(quantize)
    merge_lora_then_quantize(base, adapter, out, quantize=quantize, progress=False)
    return load(out)


def kept(model: PreTrainedModel, base: Path, changes: dict[str, torch.Tensor]) -> list[float]:
    """Share of each module's update that the weights of `model` hold: `Proof.share`."""
    shares = []
    with safe_open(base / "model.safetensors", "pt") as stored:
        for name, change in changes.items():
            weight = model.get_submodule(name).weight
            if isinstance(weight, bitsandbytes.nn.Params4bit):
                weight = dequantize_4bit(weight.data, weight.quant_state)
            before = stored.get_tensor(f"{name}.weight").float()
            proof = Proof()
            proof.add(before, before + change, weight.detach().float())
            shares.append(proof.share or 0.0)
    return shares


def scores(model: PreTrainedModel, base: Path, counts: dict[str, int], batch_size: int) -> dict[str, dict[str, float]]:
    """Exact match in each category."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    found = {}
    for category, count in counts.items():
        asked = examples(category, "held_out", SEED, count)
        given = answer(model, tokenizer, [example.prompt for example in asked], batch_size)
        found[category] = share([example.answer == text for example, text in zip(asked, given, strict=True)])
    return found


def spread(values: Sequence[float], style: str = ".1%") -> str:
    """Least, median and largest, as text."""
    return f"{min(values):{style}} to {max(values):{style}}, median {median(values):{style}}"


def by_size(sizes: Sequence[float], shares: Sequence[float]) -> Iterator[str]:
    """How much is kept of updates of like relative size, a line for each range of sizes."""
    for low, high in pairwise(SIZE_EDGES):
        chosen = [kept for size, kept in zip(sizes, shares, strict=True) if low < size <= high]
        if chosen:
            yield f"    {len(chosen):2} modules with a size of {low} to {high}: kept {spread(chosen)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=COUNT, help="held-out prompts of the new skill")
    parser.add_argument("--old-count", type=int, default=100, help="held-out prompts of each of the five categories")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--json", type=Path, help="file for the scores")
    args = parser.parse_args()

    print(
        f"CPU, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}, seed {SEED}"
    )
    exact = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(exact, args.adapter)
    changes, sizes = updates(exact), relative_sizes(exact)
    print(f"relative size of the update in {len(sizes)} modules: {spread(sizes, '.4f')}")

    counts = {SKILL: args.count} | dict.fromkeys(CATEGORIES if args.old_count else (), args.old_count)
    results: dict[str, object] = {"relative size": dict(zip(changes, sizes, strict=True))}
    print(f"{'right answers of':34}" + "".join(f"{f'{name} {count}':>14}" for name, count in counts.items()))
    with TemporaryDirectory() as scratch:
        for name, make in ways(args.base, args.adapter, Path(scratch)):
            began = time.monotonic()
            model = make().eval()
            # Before the first forward: then bitsandbytes repacks 4-bit weights for the CPU.
            shares = kept(model, args.base, changes) if name in MERGED else []
            found = scores(model, args.base, counts, args.batch_size)
            line = "".join(f"{result['right']:14.0f}" for result in found.values())
            print(f"{name:34}{line}   ({time.monotonic() - began:.0f} s)", flush=True)
            if shares:
                print(f"    kept of the update: {spread(shares)}", *by_size(sizes, shares), sep="\n", flush=True)
            results[name] = {"scores": found, "kept": dict(zip(changes, shares, strict=False))}
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
