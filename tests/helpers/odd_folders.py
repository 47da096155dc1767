"""Checkpoint folders as people have them: each is made of a straight one by what somebody's tool or hand did to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_checkpoint

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 988097824\n"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
GONE = object()


class Base(NamedTuple):
    """A straight checkpoint to begin with."""

    kind: str = "qwen2"
    tied: bool = False
    shards: bool = False
    shape: tuple[tuple[str, object], ...] = ()


class Odd(NamedTuple):
    """A change to a base, and its result: a refusal by these words, or the model that `transformers` loads.

    `straight`: `transformers` itself cannot read the folder, and the base as it was is what it stands for.
    `refused_in`: ways of loading in which it is refused all the same.
    """

    change: Callable[[Path], object]
    base: Base = Base()
    refusal: str = ""
    straight: bool = False
    refused_in: tuple[str, ...] = ()


def make_base(folder: Path, base: Base) -> Path:
    """A checkpoint of random weights, large enough that logits differ."""
    shape = {**SHAPE, **dict(base.shape)}
    made = make_checkpoint(
        folder, kind=base.kind, tied=base.tied, max_shard_size="200KB" if base.shards else "5GB", **shape
    )

    def wider(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 6 if tensor.dim() == 2 and "embed" not in name else tensor

    for file in sorted(made.glob("*.safetensors")):
        rewrite(file, lambda tensors: {name: wider(name, tensor) for name, tensor in tensors.items()})
    return made


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
    """Put other tensors into a safetensors file."""
    changed = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


def tensors(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A change of the tensors of a folder's one file."""
    return lambda folder: rewrite(folder / "model.safetensors", change)


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of all names."""
    return tensors(lambda found: {change(name): tensor for name, tensor in found.items()})


def config(file: str = "config.json", **changes: object) -> Callable[[Path], None]:
    """A change of keys; `GONE` takes one out."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in data.items() if value is not GONE}))

    return apply


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    """Several changes, one after the other."""

    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def text(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """A change of a file's bytes."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def replaced(file: str, content: bytes | str) -> Callable[[Path], object]:
    """Other contents of a file."""
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def newer_single_file(folder: Path) -> None:
    """One file of other weights beside the shards that were there."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        found |= load_file(file)
    torch.manual_seed(7)
    newer = {name: (one.float() + 0.02 * torch.randn(one.shape)).to(one.dtype) for name, one in found.items()}
    save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})


def without_shards(folder: Path) -> None:
    """The one file of newer weights, and an index of shards that are gone."""
    newer_single_file(folder)
    for file in folder.glob("model-*.safetensors"):
        file.unlink()


def named_weights(folder: Path) -> None:
    """Weights under a name of their own, which config.json gives."""
    (folder / "model.safetensors").rename(folder / "tuned.safetensors")
    config(transformers_weights="tuned.safetensors")(folder)


def floats(dtype: torch.dtype, *, only: str = "") -> Callable[[Path], None]:
    """Tensors in another dtype: all, or those whose name contains `only`."""
    return tensors(lambda found: {name: one.to(dtype) if only in name else one for name, one in found.items()})


def drop(*parts: str) -> Callable[[Path], None]:
    """Take tensors out whose name contains one of `parts`."""
    return tensors(lambda found: {k: v for k, v in found.items() if not any(part in k for part in parts)})


def add(**more: torch.Tensor) -> Callable[[Path], None]:
    """More tensors; `__` stands for a dot."""
    return tensors(lambda found: found | {name.replace("__", "."): tensor for name, tensor in more.items()})


TIED = Base(tied=True)
SHARDS = Base(shards=True)
QWEN3 = Base(kind="qwen3")
MANY_HEADS = Base(shape=(("num_attention_heads", 32), ("num_key_value_heads", 32), ("hidden_size", 64)))
ALL_HEADS = Base(shape=(("num_key_value_heads", 4),))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
OTHER_DTYPE = ("disk layers",)

FOLDERS: dict[str, Odd] = {
    "straight": Odd(lambda folder: None),
    "straight, Qwen3, tied": Odd(lambda folder: None, Base(kind="qwen3", tied=True)),
    "shards": Odd(lambda folder: None, SHARDS),
    "names without model.": Odd(renamed(lambda name: name.removeprefix("model."))),
    "names without model., Qwen3, tied": Odd(
        renamed(lambda name: name.removeprefix("model.")), Base(kind="qwen3", tied=True)
    ),
    "names with model. twice": Odd(renamed(lambda name: f"model.{name}")),
    "tied table stored as the head": Odd(renamed(lambda name: HEAD if name == TABLE else name), TIED),
    "tied, head stored too": Odd(tensors(lambda found: found | {HEAD: found[TABLE]}), TIED),
    "tied, another head stored": Odd(tensors(lambda found: found | {HEAD: found[TABLE].flip(0)}), TIED),
    "single file beside older shards": Odd(newer_single_file, SHARDS),
    "single file beside an index alone": Odd(without_shards, SHARDS),
    "weights named by config.json": Odd(named_weights),
    "float32 file": Odd(floats(torch.float32), refused_in=OTHER_DTYPE, base=Base(shape=(("hidden_size", 256),))),
    "float16 file": Odd(floats(torch.float16), refused_in=OTHER_DTYPE, base=Base(shape=(("hidden_size", 256),))),
    "norms in float32": Odd(floats(torch.float32, only="norm")),
    "tensors without a place": Odd(add(v_head__weight=torch.ones(2), rotary_emb__inv_freq=torch.ones(2))),
    "config.json with a byte-order mark": Odd(
        text("config.json", lambda data: b"\xef\xbb\xbf" + data), straight=True
    ),
    "Qwen3 without head_dim": Odd(config(head_dim=GONE), Base(kind="qwen3", shape=(("head_dim", 128),))),
    "no num_key_value_heads": Odd(config(num_key_value_heads=GONE), MANY_HEADS),
    "num_key_value_heads null": Odd(config(num_key_value_heads=None), ALL_HEADS),
    "torch_dtype": Odd(config(dtype=GONE, torch_dtype="bfloat16")),
    "no dtype": Odd(config(dtype=GONE)),
    "YaRN of transformers 4": Odd(config(rope_parameters=GONE, rope_theta=1e6, rope_scaling=YARN)),
    "YaRN of transformers 5": Odd(config(rope_parameters={**YARN, "rope_theta": 1e6})),
    "classifier": Odd(config(architectures=["Qwen2ForSequenceClassification"]), refusal="no language model"),
    "base model": Odd(config(architectures=["Qwen2Model"]), refusal="no language model"),
    "bidirectional": Odd(config(is_causal=False), refusal="is_causal False"),
    "torch.compile's prefix": Odd(renamed(lambda name: f"_orig_mod.{name}"), refusal="the prefix '_orig_mod.'"),
    "DDP's prefix": Odd(renamed(lambda name: f"module.{name}"), refusal="the prefix 'module.'"),
    "compiled inside": Odd(
        renamed(lambda name: name.replace(".self_attn.", ".self_attn._orig_mod.")), refusal="the prefix '_orig_mod.'"
    ),
    "no head": Odd(drop(HEAD), refusal="tie_word_embeddings"),
    "empty tensors": Odd(
        tensors(lambda found: {k: v[:0] if "mlp" in k else v for k, v in found.items()}), refusal="ZeRO-3"
    ),
    "a layer missing": Odd(drop("layers.2."), refusal="num_hidden_layers"),
    "another vocab_size": Odd(config(vocab_size=3000), refusal="set vocab_size to 3072"),
    "integers": Odd(floats(torch.int8, only="up_proj"), refusal="is stored as I8"),
    "Git LFS pointer": Odd(replaced("model.safetensors", POINTER), refusal="git lfs pull"),
    "web page": Odd(replaced("model.safetensors", "<!DOCTYPE html><title>Sign in</title>"), refusal="web page"),
    "cut off": Odd(text("model.safetensors", lambda data: data[:-100]), refusal="is cut off"),
    "trailing comma": Odd(
        text("config.json", lambda data: data.rstrip()[:-1].rstrip() + b",\n}"), refusal="a comma before the closing"
    ),
    "rope_theta lost": Odd(
        both(config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), config(rope_scaling=YARN)),
        refusal="drops rope_parameters",
    ),
    "layer_types too long": Odd(config(layer_types=["full_attention"] * 5), refusal="5 entries and num_hidden_layers"),
    "generation_config.json no JSON": Odd(replaced("generation_config.json", "{,}"), refusal="generation_config"),
}  # fmt: skip


def make(name: str, at: Path) -> tuple[Path, Path]:
    """The odd folder called `name`, and a straight one of the same model, both below `at`.

    The straight one is what plain `transformers` saves of the odd one, in bf16.
    """
    odd = FOLDERS[name]
    base = make_base(at / "base", odd.base)
    folder = Path(shutil.copytree(base, at / "odd"))
    odd.change(folder)
    if odd.refusal or odd.straight:
        return folder, base
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16)
    straight = Path(shutil.copytree(base, at / "straight"))
    for file in straight.glob("*.safetensors*"):
        file.unlink()
    plain.config.tie_word_embeddings = plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    plain.save_pretrained(straight)
    return folder, straight
