"""Checkpoints with the names, dtypes and shapes that each library writes, and no numbers in them: files of zeros."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

BYTES = {"I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
Entry = tuple[str, tuple[int, ...]]

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def gptq(rows: int, columns: int, bits: int = 4, group: int = 128) -> dict[str, Entry]:
    return {
        "qweight": ("I32", (columns * bits // 32, rows)),
        "qzeros": ("I32", (columns // group, rows * bits // 32)),
        "scales": ("F16", (columns // group, rows)),
        "g_idx": ("I32", (columns,)),
    }


def awq(rows: int, columns: int) -> dict[str, Entry]:
    return {
        "qweight": ("I32", (columns, rows // 8)),
        "qzeros": ("I32", (columns // 128, rows // 8)),
        "scales": ("F16", (columns // 128, rows)),
    }


def fp8_block(rows: int, columns: int) -> dict[str, Entry]:
    return {
        "weight": ("F8_E4M3", (rows, columns)),
        "weight_scale_inv": ("BF16", (-(-rows // 128), -(-columns // 128))),
    }


def packed(rows: int, columns: int) -> dict[str, Entry]:
    return {
        "weight_packed": ("I32", (rows, columns // 8)),
        "weight_scale": ("BF16", (rows, columns // 128)),
        "weight_shape": ("I64", (2,)),
    }


def rowwise(rows: int, columns: int, dtype: str = "F8_E4M3") -> dict[str, Entry]:
    return {"weight": (dtype, (rows, columns)), "weight_scale": ("BF16", (rows, 1))}


def nf4(rows: int, columns: int) -> dict[str, Entry]:
    blocks = rows * columns // 64
    return {
        "weight": ("U8", (rows * columns // 2, 1)),
        "weight.absmax": ("U8", (blocks,)),
        "weight.nested_absmax": ("F32", (-(-blocks // 256),)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (117,)),
    }


def int8(rows: int, columns: int) -> dict[str, Entry]:
    return {"weight": ("I8", (rows, columns)), "SCB": ("F32", (rows,)), "weight_format": ("U8", ())}


# Name -> config.json's quantization_config, and how a matrix is stored.
KINDS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, gptq),
    "gptq-8-bit": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, lambda r, c: gptq(r, c, 8, 32)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, fp8_block),
    "packed": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed),
    "float": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, rowwise),
    "int": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, lambda r, c: rowwise(r, c, "I8")),
}
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
}  # fmt: skip
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": None}


def entries(config: dict, matrix) -> dict[str, Entry]:
    """Every tensor of a Qwen2 or Qwen3 checkpoint whose matrices are stored as `matrix` says; 16-bit elsewhere."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    wide, narrow = heads * head, config["num_key_value_heads"] * head
    tensors: dict[str, Entry] = {
        "model.embed_tokens.weight": ("F16", (config["vocab_size"], hidden)),
        "model.norm.weight": ("F16", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = ("F16", (config["vocab_size"], hidden))
    shapes = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for module, shape in shapes.items():
            tensors |= {f"{prefix}.{module}.{name}": entry for name, entry in matrix(*shape).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("F16", (hidden,))
        if config["model_type"] == "qwen2":
            for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = ("F16", (rows,))
        else:
            for name in "qk":
                tensors[f"{prefix}.self_attn.{name}_norm.weight"] = ("F16", (head,))
    return tensors


def total(tensors: dict[str, Entry]) -> int:
    return sum(BYTES[dtype] * prod(shape) for dtype, shape in tensors.values())


def write(folder: Path, config: dict, tensors: dict[str, Entry], *, shards: int = 1) -> Path:
    """A checkpoint folder with these tensors, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        held = {name: tensors[name] for name in names[shard::shards]}
        weight_map |= dict.fromkeys(held, file)
        write_file(folder / file, held)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def as_auto_gptq(folder: Path) -> Path:
    """The same folder with the names that AutoGPTQ gave its files, and its settings in one apart."""
    for path in folder.glob("model*"):
        path.rename(folder / path.name.replace("model", "gptq_model-4bit-128g", 1))
    for index in folder.glob("*.index.json"):
        index.write_text(index.read_text().replace("model-0", "gptq_model-4bit-128g-0"))
    config = json.loads((folder / "config.json").read_text())
    settings = {key: value for key, value in config.pop("quantization_config").items() if key != "quant_method"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


def write_file(path: Path, tensors: dict[str, Entry]) -> None:
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(position))
