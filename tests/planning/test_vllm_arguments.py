"""Plans as arguments of `vllm serve`: the mapping of profiles and formats, refusals, bytes and quoting."""

import json
import re
import shlex
import shutil

import pytest

import qwen_vram as qv
from qwen_vram.planning.capacity.available_memory import DeviceMemory
from qwen_vram.planning.vllm import arguments
from qwen_vram.planning.vllm.formats import CACHE_DTYPES, STORED
from qwen_vram.planning.vllm.memory import GRAPH_BYTES, GRAPH_POOL, MARGIN, Limits, graphs_of
from qwen_vram.planning.vllm.workers import layers_of
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import PROFILES

SEVEN = "Qwen/Qwen2.5-7B-Instruct"
SIZE_7B = 15_231_233_024


def plan(vram="40GiB", model=SEVEN, **options):
    return qv.plan(model, vram=vram, ram="256GiB", **options)


def test_a_plan_in_16_bits_is_the_whole_command():
    chosen = plan("24GiB", prompt_len=4000, max_new_tokens=96, batch_size=4, prefill_chunk_size=1024)
    served = chosen.to_vllm(host="0.0.0.0", port=9000, served_model_name="seven")
    # The last one is there on a machine with a GPU.
    assert {name: value for name, value in served.arguments.items() if name != "gpu-memory-utilization"} == {
        "dtype": "bfloat16",
        "kv-cache-memory-bytes": served.memory.kv_cache,
        "max-model-len": 4096,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 1024,
        "kv-cache-dtype": "auto",
        "tensor-parallel-size": 1,
        "pipeline-parallel-size": 1,
        "host": "0.0.0.0",
        "port": 9000,
        "served-model-name": "seven",
    }
    assert served.notes == ()
    command = chosen.vllm_command(port=9000)
    assert command[:3] == ["vllm", "serve", SEVEN]
    assert command[command.index("--max-model-len") + 1] == "4096"


def test_the_terms_and_the_cache_sum_to_the_budget():
    memory = plan("24GiB", batch_size=4).to_vllm().memory
    terms = (memory.context, memory.weights, memory.buffers, memory.activations, memory.graphs, memory.margin)
    assert sum(terms) + memory.kv_cache == memory.budget == 24 * 2**30
    assert memory.weights == SIZE_7B
    assert memory.margin == MARGIN
    # Positions, 128 elements, 2 bytes; and cuBLAS's workspaces.
    assert memory.buffers == 32_768 * 128 * 2 + 33 * 2**20
    # The MLP of 2,048 tokens: residual and input, both halves and their product, in 2 bytes.
    assert memory.activations == 2048 * (2 * 3584 + 3 * 18944) * 2
    assert memory.graphs == GRAPH_POOL + GRAPH_BYTES * 7  # steps of 1, 2, 4 and 8, and decode steps of 1, 2 and 4
    assert memory.token == 57_344
    assert memory.tokens == memory.kv_cache // (57_344 * 16) * 16
    assert memory.concurrency == memory.tokens / 16 / 64


def test_the_sampler_is_counted_for_many_sequences():
    few, many = (plan("80GiB", batch_size=size, prefill_chunk_size=512).to_vllm() for size in (1, 256))
    assert few.memory.activations == 512 * (2 * 3584 + 3 * 18944) * 2
    assert many.memory.activations == 512 * 2 * 3584 * 2 + 256 * 152_064 * 31


@pytest.mark.parametrize("name", list(PROFILES))
def test_each_profile_is_mapped_or_refused_by_name(name):
    chosen = plan(profile=name)
    streamed = PROFILES[name].streamed_layers
    if streamed:
        with pytest.raises(
            qv.NotSupportedError, match=f"streamed_layers={streamed} has no counterpart in vLLM"
        ) as error:
            chosen.to_vllm()
        assert (error.value.knob, error.value.value) == ("streamed_layers", streamed)
        return
    served = chosen.to_vllm()
    profile = PROFILES[name]
    quantized = not FORMATS[profile.weights].is_dense
    assert served.arguments.get("quantization") == ("fp8_per_channel" if quantized else None)
    assert ("enforce-eager" in served.arguments) == (not profile.captures)
    said = "\n".join(served.notes)
    assert (f"weights={profile.weights!r} is not in vLLM" in said) == quantized
    assert ("lm_head" in said) == (profile.lm_head is not None)
    assert ("embeddings='host' is not in vLLM" in said) == (profile.embeddings == "host")
    assert ("dequantization='tiled'" in said) == profile.tiles
    assert ("compiled=True" in said) == profile.compiled


@pytest.mark.parametrize("weights", [name for name, row in FORMATS.items() if row.is_quantized_on_load])
def test_a_format_of_this_library_becomes_online_fp8_and_the_note_has_the_bytes(weights):
    served = plan(profile="default", weights=weights).to_vllm()
    assert served.arguments["quantization"] == "fp8_per_channel"
    in_fp8 = qv.estimate_vram(SEVEN, weights="fp8").weights
    assert served.memory.weights == in_fp8
    planned = qv.estimate_vram(SEVEN, weights=weights).weights
    if weights == "fp8":
        assert "answers may differ" in served.notes[0]
        return
    assert f"{in_fp8:,} bytes of weights on a worker, {planned:,} in {weights}" in served.notes[0]
    export = [note for note in served.notes if "a GPTQ export" in note]
    assert bool(export) == (FORMATS[weights].bits == 4)
    if export:
        # 4-bit matrices, and all else in 16 bits.
        assert f"{qv.estimate_vram(SEVEN, weights='gptq-int4').weights:,} bytes" in export[0]


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_plain_dtype_stays(weights, dtype):
    served = plan(profile="default", weights=weights).to_vllm()
    assert served.arguments["dtype"] == dtype
    assert "quantization" not in served.arguments
    assert served.memory.weights == qv.estimate_vram(SEVEN, weights=weights).weights


def test_an_old_gpu_runs_in_fp16(monkeypatch):
    from qwen_vram.planning.capacity import budget as budget_module

    monkeypatch.setattr(budget_module, "oldest_capability", lambda devices: (7, 5))
    assert plan().to_vllm().arguments["dtype"] == "float16"


def test_a_cache_in_int8_is_fp8_and_one_in_int4_has_scales():
    eight = plan(kv_cache="int8").to_vllm()
    assert eight.arguments["kv-cache-dtype"] == "fp8"
    assert eight.memory.token == 57_344 // 2
    assert "kv_cache='int8' is 'fp8' in vLLM: 1,024 bytes for a token and layer, 2,048 unquantized" in eight.notes
    assert any("the newest 128 tokens" in note for note in eight.notes)
    four = plan(kv_cache="int4").to_vllm()
    assert four.arguments["kv-cache-dtype"] == "int4_per_token_head"
    assert four.memory.token == 28 * 4 * 2 * (64 + 4)


def test_the_caller_chooses_another_cache():
    served = plan(kv_cache="int8").to_vllm(kv_cache_dtype="int8_per_token_head")
    assert served.arguments["kv-cache-dtype"] == "int8_per_token_head"
    assert served.memory.token == 28 * 4 * 2 * (128 + 4)
    assert plan().to_vllm(kv_cache_dtype="fp8").memory.token == 57_344 // 2
    with pytest.raises(
        qv.UnknownNameError, match=re.escape(f"unknown kv_cache_dtype 'q8'; choose from {', '.join(CACHE_DTYPES)}")
    ):
        plan().to_vllm(kv_cache_dtype="q8")


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"streamed_layers": 3}, "streamed_layers=3 has no counterpart in vLLM; set streamed_layers=0 and plan other"),
        ({"streamed_layers": 3, "host_layers": 2}, "host_layers=2 has no counterpart in vLLM; set host_layers=0"),
        ({"streamed_layers": 3, "disk_layers": 1}, "disk_layers=1 has no counterpart in vLLM; give a budget"),
        ({"kv_device": "host", "cache": "preallocated"}, "kv_device='host' has no counterpart in vLLM; set kv_device="),
    ],
)
def test_a_saver_that_vllm_does_not_have_is_refused(knobs, text):
    with pytest.raises(qv.NotSupportedError, match=re.escape(text)):
        plan(profile="default", **knobs).to_vllm()


def test_a_config_without_a_checkpoint_is_refused(demo):
    config = json.loads((demo / "config.json").read_text())
    with pytest.raises(qv.NotSupportedError, match="vLLM opens a checkpoint, and this plan is of a config"):
        plan(model=config).to_vllm()


def test_a_budget_without_space_is_refused_with_the_bytes_and_the_export():
    chosen = plan("8GiB", prompt_len=8000)
    assert chosen.profile.weights == "nf4"
    with pytest.raises(qv.DoesNotFitError) as error:
        chosen.to_vllm()
    text = str(error.value)
    assert "for 1 sequence(s) of 8,512 tokens, and the plan gives 8.00 GiB" in text
    assert "qwen-vram quantize MODEL OUT --weights gptq-int4" in text
    assert "give a larger budget, shorter sequences or more workers" in text
    assert error.value.budget_bytes == 8 * 2**30
    # The bytes that it names are enough.
    more = plan(error.value.needed_bytes, prompt_len=8000, profile=chosen.profile).to_vllm()
    assert more.memory.kv_cache >= 8512 * 57_344


def test_graphs_that_do_not_fit_are_off():
    roomy = plan(prompt_len=1000).to_vllm()
    short = roomy.memory.budget - roomy.memory.kv_cache + (64 + 32 + 1) * 16 * 57_344
    served = plan(short, profile="default", prompt_len=1000, captured=True, attention="fused", cache="preallocated")
    assert "graphs" not in str(served.to_vllm().notes)
    tight = plan(short - 2**20, profile=served.profile, prompt_len=1000).to_vllm()
    assert tight.arguments["enforce-eager"] is True
    assert any(note.startswith("CUDA graphs do not fit, and are off") for note in tight.notes)


def test_layers_are_shared_by_the_gpus_of_a_node():
    served = plan({0: "20GiB", 1: "20GiB"}).to_vllm()
    assert (served.arguments["tensor-parallel-size"], served.arguments["pipeline-parallel-size"]) == (2, 1)
    assert served.memory.budget == 20 * 2**30
    assert served.memory.token == 57_344 // 2
    # Norms are on both, and all else is divided: 57 norms of 3,584 elements.
    norms = 57 * 3584 * 2
    assert served.memory.weights == (SIZE_7B - norms) // 2 + norms
    assert "NCCL" in served.notes[-1]
    stages = plan({0: "20GiB", 1: "20GiB"}).to_vllm(tensor_parallel=1)
    assert stages.arguments["pipeline-parallel-size"] == 2
    assert stages.memory.token == 57_344 // 2
    # The last part has half of the layers, the last norm and the head.
    table = 152_064 * 3584 * 2
    assert stages.memory.weights == (SIZE_7B - 2 * table - 3584 * 2) // 2 + table + 3584 * 2


def test_a_head_of_keys_is_copied_if_there_are_more_workers_than_heads():
    served = plan({gpu: "20GiB" for gpu in range(4)}, model="Qwen2.5-7B-Instruct").to_vllm()
    assert served.memory.token == 57_344 // 4
    small = plan({gpu: "20GiB" for gpu in range(2)}, model="Qwen2.5-0.5B-Instruct").to_vllm()
    assert small.memory.token == 24 * 64 * 2 * 2
    # 14 heads of queries: four workers cannot share them, so layers are divided.
    assert plan({gpu: "20GiB" for gpu in range(4)}, model="Qwen2.5-0.5B-Instruct").to_vllm().workers[:2] == (1, 4)


def test_gpus_that_are_not_the_first_are_named():
    assert plan({1: "20GiB"}).to_vllm().environment == {"CUDA_VISIBLE_DEVICES": "1"}
    assert plan({0: "20GiB"}).to_vllm().environment == {}


def test_a_gpu_of_this_machine_gives_the_fraction_that_must_be_free(monkeypatch):
    cards = [DeviceMemory("a", 24 * 2**30, 2**30, 0, (8, 6)), DeviceMemory("b", 40 * 2**30, 2**30, 0, (8, 0))]
    monkeypatch.setattr(arguments, "visible_gpus", lambda: cards)
    assert plan({0: "21GiB", 1: "30GiB"}).to_vllm().arguments["gpu-memory-utilization"] == 0.75
    assert plan("18GiB").to_vllm().arguments["gpu-memory-utilization"] == 0.75
    assert "gpu-memory-utilization" not in plan({2: "18GiB"}).to_vllm().arguments


def test_several_nodes():
    first, second = (
        plan({0: "20GiB", 1: "20GiB"}).to_vllm(nodes=2, node_rank=rank, master_addr="10.0.0.1") for rank in (0, 1)
    )
    expected = {
        "tensor-parallel-size": 2,
        "pipeline-parallel-size": 2,
        "nnodes": 2,
        "node-rank": 0,
        "master-addr": "10.0.0.1",
        "distributed-executor-backend": "mp",
    }
    assert expected.items() <= first.arguments.items()
    assert "headless" not in first.arguments
    assert second.arguments["node-rank"] == 1
    assert second.arguments["headless"] is True
    assert second.command()[-1] == "--headless" or "--headless" in second.command()
    ray = plan({0: "20GiB", 1: "20GiB"}).to_vllm(nodes=2, executor="ray")
    assert ray.arguments["distributed-executor-backend"] == "ray"
    assert "nnodes" not in ray.arguments


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nodes": 2}, "2 nodes need master_addr=, the address of the first one"),
        ({"node_rank": 1}, "node_rank and master_addr are for several nodes, and nodes is 1"),
        ({"nodes": 2, "node_rank": 2, "master_addr": "a"}, "node_rank must be from 0 to 1, one for each node, got 2"),
        ({"nodes": 0}, "nodes must be a positive whole number, got 0"),
        ({"tensor_parallel": 2}, "tensor_parallel 2 x pipeline_parallel 1 is 2 workers, and the plan has 1"),
        ({"tensor_parallel": 3, "nodes": 3, "master_addr": "a"}, "tensor_parallel 3 does not divide the model's heads"),
        ({"executor": "slurm"}, "unknown executor 'slurm'; choose from mp, ray"),
    ],
)
def test_impossible_divisions_are_refused(options, text):
    with pytest.raises((qv.WorkloadError, qv.UnknownNameError), match=re.escape(text)):
        plan().to_vllm(**options)


@pytest.mark.parametrize(("layers", "parts", "counts"), [(28, 1, (28,)), (28, 3, (9, 10, 9)), (24, 5, (5, 5, 5, 5, 4))])
def test_layers_are_divided_as_vllm_divides_them(layers, parts, counts):
    assert layers_of(layers, parts) == counts


@pytest.mark.parametrize(("sequences", "step", "graphs"), [(1, 512, 3), (4, 512, 7), (256, 2048, 86), (1, 1, 2)])
def test_the_number_of_graphs(sequences, step, graphs):
    assert graphs_of(Limits(1024, sequences, step)) == graphs


def test_on_a_cpu_the_cache_is_what_the_sequences_need(demo, monkeypatch):
    served = qv.plan(demo, vram={}, ram="4GiB", batch_size=4).to_vllm()
    assert served.arguments["kv-cache-memory-bytes"] == (4 * 8 + 1) * 128 * 2560
    assert served.arguments["enforce-eager"] is True
    assert served.model == str(demo.absolute())
    assert served.environment == {}
    two = qv.plan(demo, vram={}, ram="8GiB", batch_size=4).to_vllm(tensor_parallel=2)
    # vLLM binds each worker to a NUMA node of its own.
    monkeypatch.setattr(arguments, "numa_nodes", lambda: 1)
    assert qv.plan(demo, vram={}, ram="8GiB").to_vllm(tensor_parallel=2).environment == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind"
    }
    monkeypatch.setattr(arguments, "numa_nodes", lambda: 2)
    assert qv.plan(demo, vram={}, ram="8GiB").to_vllm(tensor_parallel=2).environment == {}
    # A pipeline needs vLLM's warm-up.
    assert "enforce-eager" not in qv.plan(demo, vram={}, ram="8GiB").to_vllm(pipeline_parallel=2).arguments
    assert two.memory.budget == 4 * 2**30
    assert two.memory.token == 1280
    with pytest.raises(
        qv.NotSupportedError, match="kv_cache='int4' is 'int4_per_token_head' in vLLM, which has no kernel"
    ):
        qv.plan(demo, vram={}, ram="4GiB", kv_cache="int4").to_vllm()
    with pytest.raises(qv.DoesNotFitError, match="needs 2.58 GiB on a worker in vLLM"):
        qv.plan(demo, vram={}, ram="1GiB").to_vllm()


def test_a_name_with_blanks_and_quotes_survives_a_shell(demo, tmp_path):
    odd = tmp_path / "my model's; $HOME"
    shutil.copytree(demo, odd)
    command = qv.plan(odd, vram="8GiB").vllm_command(served_model_name="a b")
    assert command[2] == str(odd)
    assert shlex.split(str(command)) == list(command)
    assert f"'{odd}'".replace("'s", "'\"'\"'s") in str(command)


def test_the_data_is_json_and_has_the_command():
    served = plan("24GiB").to_vllm()
    data = json.loads(json.dumps(served.to_dict()))
    assert data["command"] == list(served.command())
    assert data["shell"] == str(served.command())
    assert data["memory"]["kv_cache"] == data["arguments"]["kv-cache-memory-bytes"]
    assert str(served).endswith(data["shell"])


def test_every_format_of_checkpoints_is_named():
    """Each format is one that vLLM reads, or one that this library makes while it loads, or refused."""
    read = {name for name, row in FORMATS.items() if not row.is_quantized_on_load and not row.is_dense}
    assert read == set(STORED)


def test_requests_at_once_are_sequences_of_vllm():
    served = plan("24GiB", concurrency=8).to_vllm()
    assert served.arguments["max-num-seqs"] == 8
    assert served.memory.concurrency >= 8
