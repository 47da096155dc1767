"""A head of its own for a model with tied embeddings: the token table is read twice, once as the head."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from qwen_vram.files.local import read_tensors

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GENERATION = "generation_config.json"


def load_with_own_head(folder: Path, **options: Any) -> nn.Module:
    """`from_pretrained` of a checkpoint as if the head were stored beside the table: it is quantized as it comes.

    Nothing is read before its turn, and nothing twice at once. A head that the file holds all the same is taken, as
    `transformers` does where the two differ.
    """
    from safetensors import safe_open
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.tie_word_embeddings = False
    places = {name: tensor.file for name, tensor in read_tensors(folder).items()}
    with ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(folder / file, "pt")) for file in set(places.values())}
        tensors = {name: files[file].get_slice(name) for name, file in places.items()}
        tensors.setdefault(_HEAD, tensors[_TABLE])
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model: Any = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    # What else from_pretrained takes from a folder.
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    loaded: nn.Module = model
    return loaded
