"""Every storage format that loads here, on the bundled checkpoint: exact match, distance from bf16, bytes.

    python benchmarks/backends.py                          # every format, matrices alone and with the head
    python benchmarks/backends.py --formats nf4 int4 --count 50
    python benchmarks/backends.py --formats gptq-int4 gptq-int8  # with GPTQModel, calibrated on training questions
    python benchmarks/backends.py --count 0                # bytes and time alone

Held-out questions of each category, greedy, whole answers compared. KL divergence (nats, of bf16's distribution) and
top-1 agreement are means over every position of 20 questions of each category with their answers. Milliseconds a token:
the difference of generations of 16 and of 144 tokens after a prompt of 512, the second of two rounds. Prints a table,
and with --json one line for each row.
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from cells import ms_per_token

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import CATEGORIES, Example, examples
from qwen_vram.spec.formats import FORMATS

LOADED = ("bf16", "int8", "nf4", "nf4-plain", "fp4", "int4", "int8-wo", "fp8")
SEED = 2026
COMPARED = 20
CALIBRATION = 64  # questions of each category with their answers
BATCH = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(LOADED))
    parser.add_argument("--count", type=int, default=200, help="questions of each category")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU where there is one")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    asked = {name: examples(name, "held_out", seed=SEED, count=options.count) for name in CATEGORIES}
    texts = [example for name in CATEGORIES for example in asked[name][:COMPARED]]
    with load("bf16", None, options.device) as llm:
        reference = list(logits(llm, texts))
    if not options.count:
        asked = {}
    print(
        f"{'weights':10}{'head':9}{'bytes':>11}{'ms/token':>10}"
        + "".join(f"{name:>9}" for name in asked)
        + (f"{'KL':>10}{'top-1':>9}" if asked else "")
    )
    for weights in options.formats:
        for head in (None,) if FORMATS[weights].is_dense or weights.startswith("gptq") else (None, weights):
            began = time.monotonic()
            with load(weights, head, options.device) as llm:
                row = {"weights": weights, "lm_head": llm.plan.profile.head_format, **facts(llm)}
                row["ms_per_token"] = ms_per_token(
                    lambda new, llm=llm: llm.probe(prompt_len=512, batch_size=1, max_new_tokens=new), short=16, long=144
                )
                if asked:
                    row |= {name: right(llm, asked[name]) for name in asked}
                    row |= distance(reference, logits(llm, texts))
            row |= {"count": options.count, "seconds": round(time.monotonic() - began, 1), **machine(llm)}
            show(row)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def load(weights: str, head: str | None, device: str | None) -> qv.LoadedModel:
    knobs = {"attention": "fused", "cache": "preallocated", "prompt_len": 3200, "batch_size": BATCH}
    if weights.startswith("gptq"):
        folder = quantized_by_gptq(weights, device)
        return qv.load(folder, profile="default", device=device, progress=False, **knobs)
    return qv.load(CHECKPOINT, profile="default", device=device, weights=weights, lm_head=head, progress=False, **knobs)


def quantized_by_gptq(weights: str, device: str | None) -> Path:
    """The bundled checkpoint by GPTQ, in a folder that is deleted in the end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    seen = [one for name in CATEGORIES for one in examples(name, "train", seed=SEED, count=CALIBRATION)]
    chats = [[{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}] for one in seen]
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    folder = Path(mkdtemp(prefix="gptq-"))
    atexit.register(shutil.rmtree, folder)
    out = folder / weights
    qv.quantize_gptq(CHECKPOINT, out, calibration=texts, bits=int(weights[-1]), device=device, progress=False)
    return out


def facts(llm: qv.LoadedModel) -> dict[str, Any]:
    return {"bytes": llm.report().measured["weights"], "predicted": llm.plan.estimate.weights}


def right(llm: qv.LoadedModel, asked: list[Example]) -> int:
    """How many are answered to the letter; questions of like length are asked together."""
    by_length = sorted(asked, key=lambda example: len(example.prompt))
    found = 0
    for first in range(0, len(by_length), BATCH):
        batch = by_length[first : first + BATCH]
        answers = llm.generate([render(llm, example) for example in batch], max_new_tokens=64, do_sample=False)
        found += sum(example.answer == answer for example, answer in zip(batch, answers, strict=True))
    return found


def render(llm: qv.LoadedModel, example: Example) -> str:
    turns = [{"role": "user", "content": example.prompt}]
    return str(llm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def logits(llm: qv.LoadedModel, texts: list[Example]) -> Iterator[torch.Tensor]:
    """(positions, vocab_size) of each question with its answer, on the host."""
    for example in texts:
        inputs = llm.tokenizer(render(llm, example) + example.answer, return_tensors="pt").to(llm.device)
        yield llm.model(**inputs).logits[0].cpu()


def distance(reference: list[torch.Tensor], found: Iterator[torch.Tensor]) -> dict[str, float]:
    """KL divergence of bf16's distribution in nats, and top-1 agreement, both over all positions."""
    total = agree = positions = 0.0
    for expected, got in zip(reference, found, strict=True):
        log_p, log_q = (tensor.float().log_softmax(-1) for tensor in (expected, got))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        agree += float((expected.argmax(-1) == got.argmax(-1)).sum())
        positions += len(expected)
    return {"kl": total / positions, "top1": agree / positions}


def machine(llm: qv.LoadedModel) -> dict[str, str]:
    device = torch.cuda.get_device_name() if llm.device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, **versions, "date": date.today().isoformat()}


def show(row: dict[str, Any]) -> None:
    shares = "".join(f"{100 * row[name] / row['count']:>9.1f}" for name in CATEGORIES if name in row)
    distances = f"{row['kl']:>10.5f}{row['top1']:>9.2%}" if "kl" in row else ""
    print(
        f"{row['weights']:10}{row['lm_head']:9}{row['bytes']:>11,}{row['ms_per_token']:>10.2f}{shares}{distances}",
        flush=True,
    )


if __name__ == "__main__":
    main()
