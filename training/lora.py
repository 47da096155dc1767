"""Train the demo adapter: a LoRA that teaches the demo checkpoint a sixth category, minutes on a CPU.

    python -m training.lora --out build/adapter

The base stays as it is; only the adapter's matrices are trained, in float32, and PEFT writes them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import CATEGORIES, SKILL, Example, recall, situations
from training.conversations import Batch
from training.train import BETAS, MAX_GRAD_NORM, batch_loss, perturbed

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of attention and MLP."""

RECALL_CHARS = (recall.MIN_TEXT_CHARS, 700)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one run does. `noise` is in units of `perturbed`'s `fraction`, as in the base's own training."""

    rank: int
    alpha: int
    steps: int
    warmup_steps: int
    learning_rate: float
    noise: float
    skill_rows: int
    old_rows: int
    seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate: linear up over the first steps, linear down to zero at the end."""
        return self.learning_rate * min(1, (step + 1) / self.warmup_steps) * (1 - step / self.steps)


class Drawer:
    """Draws batches of single turns from the train split, padded on the right to the longest row."""

    def __init__(self, tokenizer_file: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._rng = Random(f"lora/{seed}")
        self._streams = {name: situations(name, "train", self._rng) for name in (*CATEGORIES, SKILL)}

    def skill(self, rows: int) -> Batch:
        """Rows of the new skill."""
        return self._batch([next(self._streams[SKILL])[0] for _ in range(rows)])

    def old(self, rows: int) -> Batch:
        """Rows of the five categories in turn, so that the adapter leaves them alone; short texts to recall from."""
        return self._batch([self._old(CATEGORIES[row % len(CATEGORIES)]) for row in range(rows)])

    def _old(self, category: str) -> Example:
        if category != recall.CATEGORY:
            return next(self._streams[category])[0]
        while True:
            for example in recall.situation(self._rng, text_chars=self._rng.randint(*RECALL_CHARS)):
                if example.split == "train":
                    return example

    def _batch(self, drawn: list[Example]) -> Batch:
        rows = [self._row(example) for example in drawn]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        positions: list[int] = []
        targets: list[int] = []
        for number, (prompt, answer) in enumerate(rows):
            input_ids[number, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            first = number * width + len(prompt) - 1
            positions += range(first, first + len(answer))
            targets += answer
        return Batch(input_ids, torch.tensor(positions), torch.tensor(targets))

    def _row(self, example: Example) -> tuple[list[int], list[int]]:
        prompt = f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
        return self._encode(prompt), self._encode(f"{example.answer}<|im_end|>")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


def build(base: Path, recipe: Recipe) -> PeftModel:
    """Load the base in float32 and put untrained LoRA matrices beside its linear layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(TARGETS),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(model: PeftModel, drawer: Drawer, recipe: Recipe, log_every: int) -> None:
    """Run the recipe."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
    inner = model.get_base_model()
    frozen = [parameter for parameter in inner.model.layers.parameters() if parameter.ndim == 2]
    frozen = [parameter for parameter in frozen if not parameter.requires_grad]
    started = time.monotonic()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        losses = []
        with perturbed(frozen, recipe.noise):
            for batch in _batches(drawer, recipe):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = batch_loss(inner, batch) / len(batch.targets)
                loss.backward()
                losses.append(loss.item())
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every == 0 or step == recipe.steps - 1:
            values = " ".join(f"{loss:.4f}" for loss in losses)
            print(f"step {step:5d}  {time.monotonic() - started:6.1f} s  loss, skill and old: {values}", flush=True)


def _batches(drawer: Drawer, recipe: Recipe) -> Iterator[Batch]:
    yield drawer.skill(recipe.skill_rows)
    if recipe.old_rows:
        yield drawer.old(recipe.old_rows)


def updates(model: PeftModel) -> dict[str, Tensor]:
    """What the adapter adds to each weight, (out_features, in_features), by module."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def relative_sizes(model: PeftModel) -> list[float]:
    """Frobenius norm of each module's update, over that of the weight it is added to."""
    base = model.get_base_model()
    return [
        (update.norm() / base.get_submodule(name).get_base_layer().weight.norm()).item()
        for name, update in updates(model).items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=CHECKPOINT, help="checkpoint to adapt")
    parser.add_argument("--out", type=Path, required=True, help="adapter folder to write")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="peak")
    parser.add_argument("--noise", type=float, default=0.08, help="noise on the base's weights, share of a row's RMS")
    parser.add_argument("--skill-rows", type=int, default=24, help="rows of the new skill in a step")
    parser.add_argument("--old-rows", type=int, default=5, help="rows of the five categories in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20, help="steps between log lines")
    args = parser.parse_args()
    names = ("rank", "alpha", "steps", "warmup_steps", "learning_rate", "noise")
    names += ("skill_rows", "old_rows", "seed")
    recipe = Recipe(**{name: getattr(args, name) for name in names})

    torch.manual_seed(recipe.seed)
    model = build(args.base, recipe)
    model.print_trainable_parameters()
    train(model, Drawer(args.base / "tokenizer.json", recipe.seed), recipe, args.log_every)
    # As seen from where the command runs: an absolute path means nothing on another machine.
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(args.base)
    model.save_pretrained(args.out)
    sizes = relative_sizes(model)
    print(f"relative size of the update: {min(sizes):.4f} to {max(sizes):.4f}, median {median(sizes):.4f}")


if __name__ == "__main__":
    main()
