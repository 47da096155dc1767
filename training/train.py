"""Train the demo checkpoint: minutes on one GPU, stopped by the clock.

    python -m training.train --tokenizer build/tokenizer --out build/checkpoint --minutes 6

The learning rate follows elapsed time, so the run always ends at zero and inside its limit.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from training.conversations import STEP, Batch, Conversations
from training.tokenizer import END, MAX_POSITIONS, PAD, START, VOCAB_SIZE

SPECIAL_IDS = {PAD: 0, START: 1, END: 2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What changes over a run, as functions of the share of its time that is over (0 to 1).

    `minutes` is training time, compilation not counted. `noise` is in units of `perturbed`'s `fraction` and is
    reached when `noise_ramp` of the run is over.
    """

    minutes: float
    learning_rate: float
    noise: float
    noise_ramp: float

    def rate_at(self, step: int, done: float) -> float:
        """Learning rate: linear up over the first steps, linear down to zero at the end."""
        return self.learning_rate * min(1, (step + 1) / WARMUP_STEPS) * (1 - done)

    def noise_at(self, done: float) -> float:
        """Weight noise: linear up, then constant."""
        return self.noise * min(1, done / self.noise_ramp)


def build_model() -> Qwen2ForCausalLM:
    """Build the untrained model: 5.5 million parameters, 11.0 MB in bf16."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIAL_IDS[END],
        pad_token_id=SPECIAL_IDS[PAD],
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=SPECIAL_IDS[END], pad_token_id=SPECIAL_IDS[PAD]
    )
    return model


@contextmanager
def perturbed(weights: list[Tensor], fraction: float) -> Iterator[None]:
    """Add noise of `fraction` of each output row's root mean square, and take it away again.

    A 4-bit format moves weights by about 0.1 of that. A model trained to answer in spite of it
    keeps its answers when it is quantized.
    """
    clean = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            scale = weight.square().mean(dim=-1, keepdim=True).sqrt() * fraction
            weight.addcmul_(scale, torch.randn_like(weight))
    yield
    with torch.no_grad():
        torch._foreach_copy_(weights, clean)


def batch_loss(model: Qwen2ForCausalLM, batch: Batch) -> Tensor:
    """Summed cross entropy over the answer tokens of one batch."""
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.positions])
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    on_gpu = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=on_gpu)


def train(model: Qwen2ForCausalLM, steps: Iterator[list[Batch]], schedule: Schedule, log_every: int) -> None:
    """Train until the schedule's minutes have passed since the first step, which compiles, was done."""
    device = model.device
    optimizer = make_optimizer(model, schedule.learning_rate)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    started = time.monotonic()
    for number, step in enumerate(steps):
        if number == 1:
            started = time.monotonic()
        done = (time.monotonic() - started) / (60 * schedule.minutes) if number else 0.0
        if done >= 1:
            break
        rate = schedule.rate_at(number, done)
        for group in optimizer.param_groups:
            group["lr"] = rate

        batches = [Batch(*(tensor.to(device, non_blocking=True) for tensor in batch)) for batch in step]
        num_targets = sum(len(batch.targets) for batch in batches)
        losses = []
        with perturbed(weights, schedule.noise_at(done)):
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16):
                    loss = batch_loss(model, batch)
                torch.autograd.backward(loss / num_targets)
                losses.append(loss.detach() / len(batch.targets))
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if number % log_every == 0:
            seconds = time.monotonic() - started
            values = " ".join(f"{loss:.4f}" for loss in torch.stack(losses).tolist())
            print(f"step {number:5d}  {seconds:6.1f} s  lr {rate:.2e}  loss by row length {values}", flush=True)


def save(model: Qwen2ForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Round to bf16 and write a folder that `AutoModelForCausalLM` and `AutoTokenizer` read."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer's files")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=6.0, help="training time after compilation")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak")
    parser.add_argument("--noise", type=float, default=0.08, help="weight noise, share of a row's RMS")
    parser.add_argument("--noise-ramp", type=float, default=0.5, help="share of the run that reaches it")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=200, help="steps between log lines")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    data = Conversations(args.tokenizer / "tokenizer.json", STEP, args.seed)
    loader = DataLoader(data, batch_size=None, num_workers=args.workers, prefetch_factor=2)
    # Workers fork here, before this process touches the GPU.
    steps = iter(loader)

    model = build_model()
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    schedule = Schedule(
        minutes=args.minutes, learning_rate=args.learning_rate, noise=args.noise, noise_ramp=args.noise_ramp
    )
    train(model, steps, schedule, args.log_every)
    save(model, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
