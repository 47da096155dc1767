"""Sample texts for calibration, from a list or a file, and as tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vram.errors import WorkloadError
from qwen_vram.runtime.tensors.checkpoint import open_tokenizer

Calibration = str | Path | Sequence[str]

# Tokens of a sample that are used. Longer samples take more memory, and add little information about activations.
MOST_TOKENS = 2048


def calibration_texts(calibration: Calibration | None) -> list[str]:
    """Return the texts of `calibration`: a list, or a file with one on each line, in JSON if its name ends in .jsonl.

    A line of JSON is a text, or an object with a text under `"text"`.

    Raises:
        WorkloadError: there are no texts, a file cannot be read, or an entry is not a text.
    """
    if calibration is None:
        raise _refused(
            "calibration: GPTQ needs sample texts; pass a list of them, or a file with one on each line, some hundred "
            "of the kind that the model will read",
            None,
        )
    texts = _read(Path(calibration)) if isinstance(calibration, (str, Path)) else list(calibration)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise _refused(f"calibration: sample {number} is a {type(text).__name__}, not a text", text)
    found = [text for text in texts if text.strip()]
    if not found:
        raise _refused("calibration: no sample has any text; GPTQ needs some hundred samples", calibration)
    return found


def _read(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(
            f"calibration: cannot read {str(path)!r} ({error}); pass a text file with one sample on each line, or a "
            "list of texts",
            str(path),
        ) from error
    if path.suffix != ".jsonl":
        return lines
    try:
        entries = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise _refused(f"calibration: {str(path)!r} has a line that is not JSON ({error})", str(path)) from error
    return [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]


def tokens(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, by the tokenizer in `folder`, cut to `MOST_TOKENS`."""
    tokenizer = open_tokenizer(folder)
    return [tokenizer(text, truncation=True, max_length=MOST_TOKENS)["input_ids"] for text in texts]


def _refused(message: str, got: object) -> WorkloadError:
    return WorkloadError(message, name="calibration", got=got)
