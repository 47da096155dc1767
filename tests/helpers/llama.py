"""A tiny Llama of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen_vram.demo import CHECKPOINT

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# Its own head sizes, stretched positions, and matrices that every format takes.
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROPE = {**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}


def make_llama(folder: Path, *, vocab_size: int = 1024, **more: bool) -> Path:
    """A checkpoint of random weights, large enough that logits differ, with the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE,
        **more,
        vocab_size=vocab_size,
        rope_parameters=ROPE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for file in CHECKPOINT.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder
