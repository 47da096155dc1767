"""Faults planted into live models that plain `transformers` loaded: each is found, and a good model has none."""

import time
from dataclasses import replace

import pytest

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.spec.formats import FORMATS
from tests.helpers.machines import CPU_ONLY, GIB, RTX_4090, VERSIONS, WITH_H100

pytestmark = pytest.mark.torch

MIB = 2**20
# Lengths at which the weights of the bundled model outweigh its activations.
SHORT = {"prompt_len": 64, "max_new_tokens": 64}
LONG = {"prompt_len": 2048, "max_new_tokens": 64}


def load(folder=CHECKPOINT, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_nf4(folder=CHECKPOINT, compute="bfloat16", double=True, **options):
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=getattr(torch, compute),
        **options,
    )
    return load(folder, quantization_config=config, device_map="cpu")


def findings(model, machine=CPU_ONLY, **lengths):
    return {one.code: one for one in qv.doctor(model, machine=machine, **(lengths or SHORT)).findings}


def found(code, model, machine=CPU_ONLY, **lengths):
    """The finding of a fault, which has to be the only one."""
    result = findings(model, machine, **lengths)
    assert list(result) == [code]
    return result[code]


def facts_of(model, **changes):
    from qwen_vram.diagnosis.live_model import examine_model

    return replace(examine_model(model, rows=64, masked=False), **changes)


def on_gpu(model, machine=WITH_H100, lengths=None, **changes):
    """Findings of a model as if it were on the GPU of a described machine, as codes with findings."""
    from qwen_vram.diagnosis.checks import OF_MACHINES, OF_MODELS
    from qwen_vram.spec.workload import Workload

    subject = Subject(facts_of(model, device="cuda", **changes), machine, Workload(**(lengths or SHORT)))
    return {one.code: one for check in (*OF_MODELS, *OF_MACHINES) for one in check(subject)}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=4096,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("moe")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lengths", [SHORT, LONG, {}], ids=["short", "long", "default"])
def test_nothing_is_found_in_good_models(lengths, moe, qwen3):
    for model in (load(), load_nf4(), load(moe), load(qwen3)):
        result = qv.doctor(model, machine=CPU_ONLY, **lengths)
        assert result.is_good, str(result)


def test_nothing_is_found_in_a_model_of_this_library():
    with qv.load(CHECKPOINT, weights="nf4") as model:
        result = qv.doctor(model, machine=CPU_ONLY)
        assert result.is_good, str(result)
        assert (result.model.weights_format, result.model.is_planned) == ("nf4", True)


def test_a_model_without_a_fault_is_good_on_this_machine():
    assert qv.doctor(load()).is_good or _has_gpu()


def _has_gpu():
    import torch

    return torch.cuda.is_available()


def test_weights_in_float32():
    import torch

    wide, plain = load(dtype=torch.float32), load()
    finding = found("weights-fp32", wide)
    dense = [one for one in wide.parameters() if one.dim() == 2]
    assert (
        finding.cost_bytes
        == sum(one.nbytes for one in dense) // 2
        == sum(one.nbytes for one in plain.parameters() if one.dim() == 2)
    )


def test_weights_that_are_not_quantized_on_a_small_device(moe):
    machine = replace(CPU_ONLY, ram_total=16 * MIB)
    finding = found("weights-16bit", load(), machine)
    linear = [one.weight for name, one in load().model.layers.named_modules() if name.endswith("_proj")]
    assert finding.cost_bytes == sum(one.nbytes - FORMATS["nf4"].nbytes((one.numel(),)) for one in linear)
    slow = found("weights-16bit", load(), replace(machine, has_4bit_kernel=False))
    assert (slow.cost_bytes, slow.fix) == (sum(one.numel() for one in linear), 'qv.load(model, weights="int8-wo")')
    assert "weights-16bit" in findings(load(moe), replace(CPU_ONLY, ram_total=MIB))
    assert "weights-16bit" not in findings(load_nf4(), machine)


def peak_of(run, warm=True):
    """The most bytes that one call has allocated at once on the CPU, by torch's profiler."""
    import torch

    with torch.no_grad():
        if warm:
            run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    total = most = 0
    for one in sorted(events, key=lambda event: event.start_ns()):
        total += one.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("rows", [64, 1024])
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_4bit_matrices_that_compute_in_another_dtype_cost_what_their_largest_product_allocates(compute, rows):
    import torch

    model, good = load_nf4(compute=compute), load_nf4()
    finding = found("compute-dtype", model, prompt_len=rows, max_new_tokens=64)
    assert finding.found.endswith("and the model in bf16")
    measured = []
    for name, columns in (("up_proj", 256), ("down_proj", 768)):
        values = torch.randn(1, rows, columns, dtype=torch.bfloat16)
        layers = [getattr(one.model.layers[0].mlp, name) for one in (model, good)]
        peaks = [peak_of(lambda layer=layer, values=values: layer(values)) for layer in layers]
        measured.append(peaks[0] - peaks[1])
    assert finding.cost_bytes == pytest.approx(max(measured), rel=0.01)  # but for the scales, one number for 64 weights


def test_experts_that_bitsandbytes_left_in_16_bits(moe):
    model = load_nf4(moe)
    finding = found("experts-16bit", model)
    experts = [one for name, one in model.named_parameters() if "experts" in name]
    assert all(one.dim() == 3 for one in experts)
    assert finding.cost_bytes == sum(one.nbytes - FORMATS["nf4"].nbytes((one.numel(),)) for one in experts)


def test_linear_layers_that_were_left_out():
    finding = found("linear-16bit", load_nf4(llm_int8_skip_modules=["lm_head", "down_proj"]))
    assert finding.cost_bytes == 5 * (256 * 768 * 2 - FORMATS["nf4"].nbytes((256 * 768,)))


def test_scales_that_are_not_quantized_cost_what_a_load_with_double_quantization_saves():
    plain, double = facts_of(load_nf4(double=False)), facts_of(load_nf4())
    finding = found("double-quantization", load_nf4(double=False))
    assert finding.cost_bytes == plain.weight_bytes - double.weight_bytes


def test_a_head_that_should_be_tied(tied):
    import torch

    model = load(tied)
    assert "head-copy" not in findings(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert found("head-copy", model).cost_bytes == model.lm_head.weight.nbytes
    model.tie_weights()
    assert "head-copy" not in findings(model)


def test_gradients():
    import torch

    model, ids = load(), torch.ones(1, 8, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    assert found("gradients", model).cost_bytes == sum(one.nbytes for one in model.parameters())
    model.zero_grad(set_to_none=True)
    assert findings(model) == {}


def answer_peak(model):
    """The most bytes that a generation of 8 tokens after 1,024 allocates beside the weights."""
    import torch

    ids = torch.ones(1, 1024, dtype=torch.long)
    return peak_of(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8), warm=False)


def test_eager_attention_costs_what_a_generation_allocates():
    model = load(attn_implementation="eager")
    finding = found("attention-eager", model, prompt_len=1024, max_new_tokens=8)
    eager = answer_peak(model)
    model.set_attn_implementation("sdpa")
    assert findings(model, **LONG) == {}
    assert finding.cost_bytes == pytest.approx(eager - answer_peak(model), rel=0.001)


def test_a_flash_kernel_that_is_switched_off_costs_what_a_generation_allocates():
    import torch

    model = load()
    flash = answer_peak(model)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        finding = found("attention-no-flash", model, prompt_len=1024, max_new_tokens=8)
        math = answer_peak(model)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert "the flash kernel is switched off" in finding.found
    assert finding.fix == "torch.backends.cuda.enable_flash_sdp(True)"
    assert finding.cost_bytes == pytest.approx(math - flash, rel=0.06)  # but for a causal mask of one layer


def many_heads():
    """A model with 16 heads of queries for each two of keys, whose attention outweighs the rest."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def test_masks_of_padded_prompts_and_of_a_static_cache():
    assert found("mask-copies", load(), **LONG, batch_size=2, padded=True).cost_bytes > 2 * 2048 * 2048
    model = many_heads()
    model.generation_config.prefill_chunk_size = 512
    assert findings(model, **LONG) == {}
    model.generation_config.cache_implementation = "static"
    finding = found("mask-copies", model, **LONG)
    assert "each chunk of 512 tokens attends the whole static cache" in finding.found
    # The last chunk has 64 keys and values more, for each of 16 heads, and a mask for them.
    assert finding.cost_bytes >= 64 * 2 * 16 * 64 * 2 + 64 * 512


def test_a_static_cache_that_an_earlier_call_made_long():
    import torch
    from transformers import StaticCache

    model = load()
    model.generation_config.cache_implementation = "static"
    model.generate(torch.ones(1, 600, dtype=torch.long), max_new_tokens=2)
    finding = findings(model)["cache-oversized"]

    def held(tokens):
        cache = StaticCache(config=model.config, max_cache_len=tokens)
        cache.early_initialization(1, 2, 64, torch.bfloat16, torch.device("cpu"))
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert finding.cost_bytes == held(model._previous_max_cache_length) - held(128)
    del model._previous_max_cache_length
    assert "cache-oversized" not in findings(model)


def test_generation_without_a_cache():
    import torch

    model, lengths = load(), {"prompt_len": 256, "max_new_tokens": 64}
    model.generation_config.use_cache = False
    finding = found("cache-off", model, **lengths)
    ids, times = torch.ones(1, 256 + 32, dtype=torch.long), []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model(ids, use_cache=False, logits_to_keep=1)
            times.append(1000 * (time.perf_counter() - start))
    assert min(times) / 5 < finding.cost_ms < 5 * min(times)


def test_the_quantized_cache_of_transformers():
    model = load()
    model.generation_config.cache_implementation = "quantized"
    assert found("cache-quantized", model, **LONG).cost_bytes == (2048 + 64) * 2 * 2 * 64 * 2


def test_a_long_prompt_at_once_on_a_small_device():
    machine = replace(CPU_ONLY, ram_total=64 * MIB)
    model = load_nf4()
    finding = found("prefill-whole", model, machine, **LONG)
    model.generation_config.prefill_chunk_size = 1024
    assert findings(model, machine, **LONG) == {}
    whole, chunked = (qv.estimate_vram(CHECKPOINT, "default", weights="nf4", prefill_chunk_size=one, **LONG)
                      for one in (None, 1024))  # fmt: skip
    assert finding.cost_bytes == whole.tensors - chunked.tensors


def generated(model):
    import torch

    return model.generate(torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.parametrize("place", ["host", "disk"])
def test_weights_that_hooks_move(place, tmp_path):
    import accelerate

    model, expected = load(), generated(load())
    if place == "host":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    finding = found(f"offload-{place}", model)
    facts = facts_of(model)
    assert getattr(facts.offload, place) == sum(one.nbytes for one in load().parameters())
    assert finding.cost_ms > 0
    assert "measured on the hooks of" in finding.cost
    assert generated(model) == expected  # the examined model is as before


def test_unpinned_offloaded_weights_beside_a_gpu():
    import accelerate

    model = load()
    accelerate.cpu_offload(model, execution_device="cpu")
    moved = sum(one.nbytes for one in load().parameters())
    finding = on_gpu(model)["offload-unpinned"]
    assert finding.cost_ms == pytest.approx(1000 * moved * (1 / 7.4e9 - 1 / 55e9))


def test_a_model_on_the_cpu_beside_a_gpu():
    finding = findings(load(), WITH_H100)["gpu-unused"]
    weights = facts_of(load()).weight_bytes
    assert 1000 * weights / 20e9 * 0.9 < finding.cost_ms < 1000 * weights / 20e9


def test_a_host_without_memory_for_the_prompt():
    finding = findings(load(), replace(CPU_ONLY, ram_available=MIB), **LONG)["host-memory"]
    assert finding.cost_bytes > MIB


def test_faults_of_models_on_a_described_gpu():
    assert on_gpu(load()) == {}
    assert set(on_gpu(load(), replace(WITH_H100, versions={**VERSIONS, "torch": "2.9.1"}), has_conv3d=True)) == {
        "version-torch"
    }
    old = replace(WITH_H100, versions={**VERSIONS, "bitsandbytes": "0.49.2"})
    several = {**SHORT, "batch_size": 4}
    assert on_gpu(load_nf4(), old, several)["version-bitsandbytes"].cost_bytes == 256 * 768 * 2
    assert on_gpu(load_nf4(), old) == {}
    generation = replace(facts_of(load()).generation, cache="offloaded")
    offloaded = on_gpu(load(), generation=generation)["cache-offloaded"]
    assert offloaded.cost_ms == pytest.approx(1000 * 128 * 5 * 2 * 2 * 64 * 2 / 7.4e9)


def test_chunks_with_masks_on_a_described_gpu():
    small = replace(WITH_H100, gpus=(replace(RTX_4090, total=GIB, free=GIB),))
    generation = replace(facts_of(load()).generation, chunk=512)
    lengths = {"prompt_len": 3900, "max_new_tokens": 64}
    assert (
        "each chunk of 512 tokens after the first has a mask"
        in on_gpu(load(), small, lengths, generation=generation)["mask-copies"].found
    )


def test_linear_attention_in_plain_torch_on_a_described_gpu():
    import torch
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    assert qv.doctor(model, machine=CPU_ONLY).is_good
    finding = on_gpu(model)["linear-attention-torch"]
    assert finding.cost_bytes == 64 * 4 * (32 + 32 + 32) * 4
    ignored = replace(WITH_H100, versions={**VERSIONS, "kernels": "0.17.2"})
    assert "ignores kernels 0.17.2" in on_gpu(model, ignored)["linear-attention-torch"].found
    fast = replace(WITH_H100, versions={**VERSIONS, "flash-linear-attention": "0.5.0"})
    assert on_gpu(model, fast) == {}


def test_an_adapter_beside_a_quantized_base_is_no_fault(adapter, untied):
    import peft

    model = peft.PeftModel.from_pretrained(load_nf4(untied), adapter)
    result = qv.doctor(model, machine=CPU_ONLY, **SHORT)
    assert result.is_good, str(result)
    assert any("lora_A" in one.name for one in result.model.matrices)


def test_tensors_of_torchao_count_as_quantized():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    facts, plain = facts_of(model), facts_of(load())
    coded = [one for one in facts.matrices if not one.is_dense]
    assert len(coded) == 35
    saved = sum(one.numel for one in coded)
    assert plain.weight_bytes - saved < facts.weight_bytes < plain.weight_bytes - 0.98 * saved
    assert findings(model, replace(CPU_ONLY, ram_total=16 * MIB)).keys() <= {"prefill-whole"}


def test_a_model_that_has_answered_on_the_cpu_has_no_other_finding():
    model = load_nf4()
    generated(model)
    assert findings(model) == {}


def test_what_is_no_model_is_refused():
    with pytest.raises(qv.ConfigError, match="doctor takes a live model of transformers, .* got dict"):
        qv.doctor({"model_type": "qwen2"}, machine=CPU_ONLY)


def test_other_families_are_examined_too():
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=128, n_positions=256)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert set(findings(model)) >= {"weights-fp32", "attention-eager"}
    assert set(findings(model.to(torch.bfloat16))) == {"attention-eager"}
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2))
    assert findings(mamba.to(torch.bfloat16).eval()) == {}
