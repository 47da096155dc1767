"""Shapes and counts, held against published totals and against transformers on the meta device."""

import dataclasses
import functools

import pytest

from qwen_vram.arithmetic.kv_cache import kv_bytes_per_token
from qwen_vram.spec.catalog import CATALOG, find, row_architecture
from qwen_vram.spec.profile import Profile

# Parameters and KV bytes per token in bf16. Source: the published checkpoints' safetensors headers.
GOLDEN = [
    ("Qwen2.5-0.5B", 494_032_768, 12_288),
    ("Qwen2.5-1.5B", 1_543_714_304, 28_672),
    ("Qwen2.5-3B", 3_085_938_688, 36_864),
    ("Qwen2.5-7B", 7_615_616_512, 57_344),
    ("Qwen2.5-14B", 14_770_033_664, 196_608),
    ("Qwen2.5-32B", 32_763_876_352, 262_144),
    ("Qwen2.5-72B", 72_706_203_648, 327_680),
    ("Qwen3-0.6B", 596_049_920, 114_688),
    ("Qwen3-1.7B", 1_720_574_976, 114_688),
    ("Qwen3-4B", 4_022_468_096, 147_456),
    ("Qwen3-8B", 8_190_735_360, 147_456),
    ("Qwen3-14B", 14_768_307_200, 163_840),
    ("Qwen3-32B", 32_762_123_264, 262_144),
]


@pytest.mark.parametrize(("name", "parameters", "kv_bytes"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_counts_are_the_published_ones(name, parameters, kv_bytes):
    architecture = find(name)
    assert architecture.num_parameters == parameters
    assert sum(weight.numel for weight in architecture.weights()) == parameters
    assert kv_bytes_per_token(architecture, Profile()) == kv_bytes


@functools.cache
def meta_parameters(**shape):
    """Name and shape of every parameter of a transformers model that has no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.torch
def test_every_weight_is_the_one_that_transformers_makes(name):
    row = CATALOG[name]
    shape = row.shape._asdict()
    ours = {weight.name: weight.shape for weight in row_architecture(row).weights()}
    assert ours == meta_parameters(**shape)


@pytest.mark.torch
def test_biases_of_a_qwen3_that_has_them_are_counted():
    shape = {**CATALOG["Qwen/Qwen3-0.6B"].shape._asdict(), "attention_bias": True}
    from qwen_vram import Architecture

    architecture = Architecture.from_config({**shape, "max_position_embeddings": 4096})
    assert {weight.name: weight.shape for weight in architecture.weights()} == meta_parameters(**shape)


def test_without_heads_for_keys_and_values_there_are_as_many_as_for_queries():
    from qwen_vram import Architecture

    shape = {**CATALOG["Qwen/Qwen2.5-0.5B"].shape._asdict(), "num_key_value_heads": None}
    architecture = Architecture.from_config({**shape, "max_position_embeddings": 4096})
    shapes = {weight.name: weight.shape for weight in architecture.weights()}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (896, 896)


def test_a_name_is_found_with_and_without_its_organisation():
    assert find("qwen2.5-7b-instruct") == find("Qwen/Qwen2.5-7B-Instruct")


def test_every_row_names_its_source():
    for name, row in CATALOG.items():
        assert row.source == f"https://huggingface.co/{name}/blob/main/config.json"


def test_yarn_stretches_the_positions():
    from qwen_vram import Architecture

    config = {**CATALOG["Qwen/Qwen2.5-7B-Instruct"].shape._asdict(), "max_position_embeddings": 32_768}
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert Architecture.from_config(config).max_position_embeddings == 131_072
    assert dataclasses.is_dataclass(Architecture)
