"""Measure how far storage formats are from bf16 on a real checkpoint, on the CPU or a GPU.

    python benchmarks/real_formats.py CHECKPOINT OUT.jsonl [--formats int8 int8-wo fp8]

The bf16 model answers 12 questions greedily, 96 tokens each. Every format is fed these questions with their answers.
KL divergence (nats, of bf16's distribution) and agreement of the likeliest token are means over the answers' tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import qwen_vram as qv

QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "What is the difference between a process and a thread?",
    "Explain in two sentences what a hash table is.",
    "Write a SQL query that counts the orders of each customer.",
    "Translate into French: The train leaves at seven in the morning.",
    "用一句话解释什么是光合作用。",
    "Why is the sky blue?",
    "Write a shell command that finds all files larger than 100 MB.",
    "What does the HTTP status code 404 mean, and how does it differ from 500?",
    "List three causes of inflation.",
    "Reverse a linked list in C.",
    "What is 17 times 23? Explain each step.",
)
NEW_TOKENS = 96
WORK = {"prompt_len": 256, "max_new_tokens": NEW_TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="rows are added to it")
    parser.add_argument("--formats", nargs="+", default=["int8", "int8-wo", "fp8", "nf4"])
    parser.add_argument("--device", help="cuda or cpu; default: the GPU where there is one")
    options = parser.parse_args()
    with load(options.checkpoint, "bf16", options.device) as llm:
        texts = [answered(llm, question) for question in QUESTIONS]
        expected = [logits(llm, *text) for text in texts]
    for weights in options.formats:
        with load(options.checkpoint, weights, options.device) as llm:
            row = distances(expected, [logits(llm, *text) for text in texts])
            name = torch.cuda.get_device_name() if llm.device.type == "cuda" else "CPU"
        row |= {"format": weights, "checkpoint": options.checkpoint.name, "device": name, "torch": torch.__version__}
        row["date"] = date.today().isoformat()
        print(json.dumps(row), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def load(folder: Path, weights: str, device: str | None) -> qv.LoadedModel:
    """The checkpoint in a format; the head stays in 16 bits."""
    return qv.load(folder, profile="default", weights=weights, device=device, progress=False, **WORK)


def answered(llm: qv.LoadedModel, question: str) -> tuple[torch.Tensor, int]:
    """Token ids of a question with its greedy answer, (1, tokens), and where the answer begins."""
    chat = [{"role": "user", "content": question}]
    prompt = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = prompt["input_ids"].to(llm.device)
    made = llm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return made, ids.shape[1]


@torch.inference_mode()
def logits(llm: qv.LoadedModel, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, (tokens, vocab_size), on the host."""
    found: torch.Tensor = llm.model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    return found.cpu()


def distances(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, Any]:
    """Mean KL divergence and top-1 agreement, over all tokens."""
    one, other = torch.cat(expected), torch.cat(found)
    kl = (one.exp() * (one - other)).sum(-1).mean()
    agree = (one.argmax(-1) == other.argmax(-1)).float().mean()
    return {"kl": round(kl.item(), 6), "top_1": round(agree.item(), 4), "tokens": len(one)}


if __name__ == "__main__":
    sys.exit(main())
