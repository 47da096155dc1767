"""Examine a checkpoint on held-out prompts: greedy decoding, whole answers compared character by character.

    python -m training.evaluate qwen_vram/demo/checkpoint

Uses nothing but transformers: `AutoModelForCausalLM` in bf16, `generate`, the chat template.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qwen_vram.demo.tasks import CATEGORIES, Example, examples

SEED = 2026
COUNT = 200
MAX_NEW_TOKENS = 64
LENGTH_EDGES = (0, 500, 1000, 2000, 3000)
"""Bounds of the prompt-length buckets in tokens, chat markup included."""


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as one user turn, with the opening of the assistant's."""
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int
) -> list[str]:
    """Answer every prompt greedily, prompts of like length together."""
    texts = [render(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    answers = [""] * len(texts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        inputs = tokenizer([texts[at] for at in chosen], return_tensors="pt", padding=True).to(model.device)
        outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        replies = outputs[:, inputs["input_ids"].shape[1] :]
        for at, reply in zip(chosen, tokenizer.batch_decode(replies, skip_special_tokens=True), strict=True):
            answers[at] = reply
    return answers


def share(right: Sequence[bool]) -> dict[str, float]:
    """Exact matches as a count and a percentage."""
    return {"right": sum(right), "of": len(right), "percent": round(100 * sum(right) / len(right), 1)}


def report(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Example], answers: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Exact match over all examples, and over the recall examples by prompt length."""
    right = [example.answer == given for example, given in zip(asked, answers, strict=True)]
    scores = {
        category: share([ok for example, ok in zip(asked, right, strict=True) if example.category == category])
        for category in CATEGORIES
    }
    lengths = [len(tokenizer(render(tokenizer, example.prompt))["input_ids"]) for example in asked]
    for low, high in pairwise(LENGTH_EDGES):
        bucket = [
            ok
            for example, ok, length in zip(asked, right, lengths, strict=True)
            if example.category == "recall" and low < length <= high
        ]
        if bucket:
            scores[f"recall, {low + 1} to {high} tokens"] = share(bucket)
    return scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=COUNT, help="held-out prompts per category")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--wrong", type=int, default=3, help="wrong answers to show per category")
    parser.add_argument("--json", type=Path, help="file for the scores")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).to(device).eval()

    asked = [example for category in CATEGORIES for example in examples(category, "held_out", args.seed, args.count)]
    answers = answer(model, tokenizer, [example.prompt for example in asked], args.batch_size)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, bf16, seed {args.seed}")
    scores = report(tokenizer, asked, answers)
    for label, score in scores.items():
        print(f"{label:32} {score['right']:4.0f} of {score['of']:4.0f}  {score['percent']:5.1f} %")
    for category in CATEGORIES:
        mistakes = [pair for pair in zip(asked, answers, strict=True) if pair[0].category == category]
        mistakes = [(example, given) for example, given in mistakes if example.answer != given]
        for example, given in mistakes[: args.wrong]:
            print(f"wrong: {example.question!r} wants {example.answer!r}, got {given!r}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
