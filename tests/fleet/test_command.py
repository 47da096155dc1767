"""Commands of servers: machines, GPUs, ports, and options that the installed `transformers serve` knows."""

import shlex

import pytest

import qwen_vram as qv
from tests.fleet.fleets import SEVEN, fleet


def options(arguments):
    """The options of a command by name; a flag is `True`."""
    pairs = zip(arguments, (*arguments[1:], "--"), strict=True)
    return {name: True if value.startswith("--") else value for name, value in pairs if name.startswith("--")}


def test_servers_fill_one_machine_after_the_other():
    plan = fleet("L4", concurrent_users=450, weights="bf16", tensor_parallel=2, gpus_per_node=5)
    servers = plan.vllm_commands()
    assert len(servers) == plan.best.replicas > 4
    assert [(one.node, one.gpus, one.port) for one in servers[:4]] == [
        (0, (0, 1), 8000), (0, (2, 3), 8001), (1, (0, 1), 8000), (1, (2, 3), 8001),
    ]  # fmt: skip
    assert str(servers[1]).startswith("CUDA_VISIBLE_DEVICES=2,3 vllm serve Qwen/Qwen2.5-7B-Instruct --")
    assert shlex.split(str(servers[1]))[1:] == list(servers[1].arguments)


def test_the_options_are_those_of_the_simulated_replica():
    plan = fleet("L4", weights="fp8", prompt_len=(100, 3000), max_new_tokens=400)
    best, given = plan.best, options(plan.vllm_commands()[0].arguments)
    assert given["--kv-cache-memory-bytes"] == str(best.memory.kv_cache)
    assert best.memory.kv_cache % (best.limits.blocks + 1) == 0  # one block stays empty
    assert given["--max-model-len"] == "3400"
    assert given["--max-num-seqs"] == str(best.limits.sequences)
    assert given["--max-num-batched-tokens"] == str(best.limits.step_tokens)
    assert given["--tensor-parallel-size"] == str(best.tensor_parallel)
    assert given["--quantization"] == "fp8_per_channel"
    assert given["--dtype"] == "bfloat16"
    assert given["--host"] == "127.0.0.1"
    old = options(fleet("T4", concurrent_users=2).vllm_commands()[0].arguments)
    assert old["--dtype"] == "float16"
    assert "--quantization" not in old


def test_other_options_have_their_own_commands():
    plan = fleet("L4,A100-80GB", weights=("bf16", "fp8"))
    for number, option in enumerate(plan.options):
        given = options(plan.commands(number)[0].arguments)
        assert given["--kv-cache-memory-bytes"] == str(option.memory.kv_cache)
        assert ("--quantization" in given) == (option.weights == "fp8")


def test_the_installed_transformers_knows_the_options():
    """The parser of `transformers serve` of the installed version."""
    from transformers.cli.transformers import app
    from typer.main import get_command

    serve = (app if hasattr(app, "commands") else get_command(app)).commands["serve"]
    plan = fleet("RTX 4090", engine="transformers", concurrent_users=2, tokens_per_second=5)
    for number, option in enumerate(plan.options):
        arguments = plan.commands(number)[0].arguments
        assert arguments[:2] == ("transformers", "serve")
        parsed = serve.make_context("serve", list(arguments[2:])).params
        assert parsed["force_model"] == f"Qwen/{SEVEN}"
        assert parsed["continuous_batching"] is True
        assert parsed["cb_num_blocks"] == option.limits.blocks + 2
        assert (parsed["cb_block_size"], parsed["cb_max_batch_tokens"], parsed["port"]) == (256, 2048, 8000)
        assert parsed["quantization"] == {"bf16": None, "int8": "bnb-8bit", "nf4": "bnb-4bit"}[option.weights]


def test_an_export_is_made_first():
    plan = fleet("A10", weights="gptq-int4", concurrent_users=4)
    with pytest.raises(qv.NotSupportedError, match="gptq-int4 weights are an export: write it with qv.quantize_gptq"):
        plan.vllm_commands()


def test_another_engine_has_no_vllm_command():
    plan = fleet("RTX 4090", engine="transformers", concurrent_users=2, tokens_per_second=5, weights="bf16")
    with pytest.raises(qv.NotSupportedError, match="the plan is for engine 'transformers'; plan with engine='vllm'"):
        plan.vllm_commands()
