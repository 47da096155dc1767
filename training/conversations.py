"""Endless training data: rows of chat turns from the train split, in a few fixed shapes.

A row holds one conversation. Questions about one text or table follow each other, so a long text
is paid for once and asked about many times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qwen_vram.demo.tasks import Example, recall, situations

SHORT_WEIGHTS = {"chinese": 20, "math": 30, "code": 15, "table": 25, "recall": 10}
"""How often each category opens or continues a row, out of 100."""

SHORT_RECALL_CHARS = (recall.MIN_TEXT_CHARS, 1_500)
SYSTEM_SHARE = 0.1
SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """Rows of one length; `text_chars` bounds the recall text that opens each, `None` for any category."""

    rows: int
    row_len: int
    text_chars: tuple[int, int] | None


STEP = (
    RowShape(rows=144, row_len=512, text_chars=None),
    RowShape(rows=16, row_len=1024, text_chars=(1_500, 3_600)),
    RowShape(rows=16, row_len=2048, text_chars=(3_600, 8_000)),
    RowShape(rows=16, row_len=3328, text_chars=(8_000, recall.MAX_TEXT_CHARS)),
)
"""One optimizer step: 176,128 tokens. Fixed shapes, so that each is compiled once."""


class Batch(NamedTuple):
    """Rows of one shape.

    `input_ids` is (rows, row_len). `positions` (n,) are indices into the flattened rows whose next
    token is part of an answer, and `targets` (n,) those next tokens.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


class Conversations(IterableDataset[list[Batch]]):
    """Draws steps without end; every loader worker draws its own.

    Args:
        tokenizer_file: The checkpoint's tokenizer.json.
        shapes: The batches that make up one step.
        seed: Together with the worker's number it fixes what is drawn.
    """

    def __init__(self, tokenizer_file: Path, shapes: tuple[RowShape, ...], seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._shapes = shapes
        self._seed = seed
        (self._start,) = self._encode("<|im_start|>")
        (self._end,) = self._encode("<|im_end|>")
        self._newline = self._encode("\n")
        self._user = [self._start, *self._encode("user\n")]
        self._assistant = [self._start, *self._encode("assistant\n")]
        self._system = [self._start, *self._encode(f"system\n{SYSTEM_PROMPT}"), self._end, *self._newline]

    def __iter__(self) -> Iterator[list[Batch]]:
        worker = get_worker_info()
        rng = Random(f"{self._seed}/{worker.id if worker else 0}")
        short = {category: situations(category, "train", rng) for category in SHORT_WEIGHTS}
        while True:
            yield [self._batch(shape, short, rng) for shape in self._shapes]

    def _batch(self, shape: RowShape, short: dict[str, Iterator[list[Example]]], rng: Random) -> Batch:
        input_ids = torch.zeros(shape.rows, shape.row_len, dtype=torch.int64)
        positions: list[int] = []
        targets: list[int] = []
        for row in range(shape.rows):
            tokens, answered = self._row(shape, short, rng)
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            positions += [row * shape.row_len + at - 1 for at in answered]
            targets += [tokens[at] for at in answered]
        return Batch(input_ids, torch.tensor(positions), torch.tensor(targets))

    def _row(
        self, shape: RowShape, short: dict[str, Iterator[list[Example]]], rng: Random
    ) -> tuple[list[int], list[int]]:
        """Return a row's tokens and the places in it that belong to answers."""
        tokens = list(self._system) if rng.random() < SYSTEM_SHARE else []
        answered: list[int] = []
        about = _recall(rng, shape.text_chars) if shape.text_chars else _any(short, rng)
        while True:
            for number, example in enumerate(about):
                prompt = example.question if number else example.prompt
                answer = [*self._encode(example.answer), self._end, *self._newline]
                opening = [*self._user, *self._encode(prompt), self._end, *self._newline, *self._assistant]
                if len(tokens) + len(opening) + len(answer) > shape.row_len:
                    return tokens, answered
                tokens += opening
                answered += range(len(tokens), len(tokens) + len(answer) - len(self._newline))
                tokens += answer
            about = _any(short, rng)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids


def _any(short: dict[str, Iterator[list[Example]]], rng: Random) -> list[Example]:
    (category,) = rng.choices(tuple(SHORT_WEIGHTS), tuple(SHORT_WEIGHTS.values()))
    return _recall(rng, SHORT_RECALL_CHARS) if category == recall.CATEGORY else next(short[category])


def _recall(rng: Random, text_chars: tuple[int, int]) -> list[Example]:
    while True:
        drawn = recall.situation(rng, text_chars=rng.randint(*text_chars))
        kept = [example for example in drawn if example.split == "train"]
        if kept:
            return kept
