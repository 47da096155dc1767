"""Train the demo checkpoint's byte-level BPE and write its tokenizer files.

    python -m training.tokenizer build/tokenizer

Normalizer, pre-tokenizer and chat format are those of Qwen2.5, so that `Qwen2Tokenizer` reads the
result and digits stand alone; the merges are learned here, from prompts of the train split only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwen_vram.demo.tasks import CATEGORIES, examples

VOCAB_SIZE = 3072
MAX_POSITIONS = 4096

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/tokenizer.json, "pre_tokenizer"
QWEN2_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

EXAMPLES_PER_CATEGORY = {"chinese": 20_000, "math": 4_000, "code": 8_000, "table": 4_000, "recall": 400}

SEED = 1


def corpus() -> Iterator[str]:
    """Yield prompts and answers of the train split, and the words of the chat format."""
    yield from ["system\n", "user\n", "assistant\n", "You are a helpful assistant."] * 1000
    for category in CATEGORIES:
        for example in examples(category, "train", SEED, EXAMPLES_PER_CATEGORY[category]):
            text = f"{example.prompt}\n{example.answer}"
            # Chinese character by character: a merge across words would hide the word to copy.
            yield from text if category == "chinese" else [text]


def train() -> Tokenizer:
    """Learn `VOCAB_SIZE` tokens, the three special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": PAD,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder to write into")
    folder = parser.parse_args().folder
    tokenizer = train()
    write(tokenizer, folder)
    print(f"{tokenizer.get_vocab_size()} tokens in {folder}")


if __name__ == "__main__":
    main()
