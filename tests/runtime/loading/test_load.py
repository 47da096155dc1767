"""Loading on the CPU, with the real libraries: bytes, answers, reports, and what `transformers` does with the model."""

import shutil
from dataclasses import replace

import pytest
import torch

import qwen_vram as qv
from qwen_vram.arithmetic.weights import stored_weights
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.generation.generations import Generations
from qwen_vram.runtime.measure import weight_storages
from qwen_vram.runtime.tensors import gc_scope as garbage

SEVEN = "Qwen/Qwen2.5-7B-Instruct"
QUANTIZED = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8", "int4", "int8-wo", "fp8")
FORMATS = ("bf16", "fp32", "fp16", *QUANTIZED)


def load(model, **knobs):
    return qv.load(model, profile=knobs.pop("profile", "default"), progress=False, **knobs)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("model", ["untied", "tied", "qwen3", "demo"])
def test_every_weight_takes_the_bytes_that_were_predicted(request, model, weights):
    with load(request.getfixturevalue(model), weights=weights) as llm:
        plan = llm.plan
        real = weight_storages(llm.model, get_backend(weights))
        predicted = {
            stored.weight.name: stored.nbytes for stored in stored_weights(plan.estimate.architecture, plan.profile)
        }
        assert real == predicted
        assert sum(real.values()) == plan.estimate.weights == llm.report().measured["weights"]


@pytest.mark.parametrize("weights", QUANTIZED)
def test_a_quantized_head_takes_the_bytes_that_were_predicted(demo, weights):
    with load(demo, weights=weights, lm_head=weights) as llm:
        assert sum(weight_storages(llm.model, get_backend(weights)).values()) == llm.plan.estimate.weights
        assert type(llm.model.lm_head) is type(llm.model.model.layers[0].mlp.up_proj) is not torch.nn.Linear


@pytest.mark.parametrize("weights", ["nf4", "nf4-plain", "fp4", "fp4-plain"])
def test_4_bit_weights_compute_in_the_models_own_dtype(demo, weights):
    with load(demo, weights=weights) as llm:
        projection = llm.model.model.layers[0].mlp.up_proj
        assert projection.compute_dtype is torch.bfloat16
        assert projection.weight.quant_state.quant_type == weights.removesuffix("-plain")
        assert projection.weight.quant_state.nested is not weights.endswith("-plain")


PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
SAVERS = [
    {"cache": "preallocated"},
    {"cache": "static"},
    {"attention": "eager"},
    {"attention": "fused"},
    {"prefill_chunk_size": 16},
    {"embeddings": "host"},
    {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 7, "embeddings": "host"},
]


@pytest.mark.parametrize("chunk", [None, 16])
def test_fused_attention_over_a_static_cache_sees_the_prompt_alone(untied, chunk):
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    with load(untied, weights="fp32") as plain:
        expected = plain.generate(PROMPT, **options)
    with load(untied, weights="fp32", attention="fused", cache="static", prefill_chunk_size=chunk) as llm:
        assert llm.generate(PROMPT, **options) == expected


@pytest.mark.parametrize("knobs", SAVERS, ids=str)
def test_lossless_knobs_give_the_same_tokens_as_plain_transformers(untied, knobs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(untied)
    plain = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    inputs = tokenizer([PROMPT, "short"], return_tensors="pt", padding=True, padding_side="left")
    expected = plain.generate(**inputs, max_new_tokens=24, do_sample=False)
    texts = tokenizer.batch_decode(expected[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with load(untied, weights="fp32", **knobs) as llm:
        assert llm.generate([PROMPT, "short"], max_new_tokens=24, do_sample=False) == texts


def test_a_model_unpacks_into_model_and_tokenizer(untied):
    model, tokenizer = load(untied)
    inputs = tokenizer("hello", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape == (1, inputs["input_ids"].shape[1] + 4)


def test_chat_generate_and_stream_agree(demo):
    with load(demo) as llm:
        question = "What is 12 + 30?"
        answer = llm.chat(question, max_new_tokens=24, do_sample=False)
        assert answer
        assert "".join(llm.stream(question, max_new_tokens=24, do_sample=False)) == answer
        prompt = llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        assert llm.generate(prompt, max_new_tokens=24, do_sample=False) == answer


def test_leaving_a_stream_stops_the_generation(untied):
    with load(untied, max_new_tokens=2000) as llm:
        stream = llm.stream("hello", max_new_tokens=2000, do_sample=False, eos_token_id=None)
        next(stream)
        stream.close()
        assert llm.report().estimate.workload.max_new_tokens < 2000


def test_an_error_inside_a_stream_reaches_the_reader(untied):
    with load(untied) as llm, pytest.raises(ValueError, match="num_beams"):
        list(llm.stream("hello", max_new_tokens=4, num_beams=4))


def test_generations_that_a_plan_covers_take_the_same_block(untied):
    settings = {"profile": "default", "attention": "fused", "cache": "preallocated", "progress": False}
    with qv.load(untied, prompt_len=40, max_new_tokens=60, batch_size=2, **settings) as llm:
        held = []
        for texts, new in ((["word"], 3), (["word " * 20], 60), (["word"] * 2, 3), (["word " * 50], 2), (["word"], 90)):
            llm.generate(texts, max_new_tokens=new, do_sample=False)
            report = llm.report()
            assert report.measured["kv_cache"] == report.estimate.kv_cache
            held.append(report.measured["kv_cache"])
        assert held[0] == held[1] == held[4] == held[2] // 2
        # A longer prompt than planned was checked with a cache of its own, and takes that.
        assert held[3] < held[0]


def test_a_cache_of_the_callers_may_be_one_token_shorter(untied):
    with qv.load(untied, profile="default", attention="fused", cache="preallocated", progress=False) as llm:
        expected = llm.generate(["word word"], max_new_tokens=1, do_sample=False)
        length = len(llm.tokenizer("word word")["input_ids"])
        cache = llm.new_cache(max_length=length)
        assert llm.generate(["word word"], max_new_tokens=1, do_sample=False, past_key_values=cache) == expected


def test_a_report_holds_the_cache_against_the_prediction(untied):
    with load(untied, cache="preallocated", attention="fused") as llm:
        llm.generate(PROMPT, max_new_tokens=16, do_sample=False)
        report = llm.report()
        assert report.measured["kv_cache"] == report.estimate.kv_cache
        assert report.measured["weights"] == report.estimate.weights
        assert "+0.00%" in str(report)
        assert report.to_dict()["peak_allocated"]["measured"] is None  # nothing measures peaks on the CPU


def test_a_dynamic_cache_ends_one_token_short_of_the_context(untied):
    with load(untied) as llm:
        llm.generate(PROMPT, max_new_tokens=16, do_sample=False, eos_token_id=None)
        report = llm.report()
        per_token = report.estimate.kv_cache // report.estimate.workload.context_len
        assert report.measured["kv_cache"] == report.estimate.kv_cache - per_token


def test_a_closed_model_says_so(untied):
    llm = load(untied)
    llm.close()
    llm.close()
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        llm.chat("hello")
    assert "closed" in repr(llm)


def test_a_conversation_longer_than_planned_is_refused_before_it_runs(untied):
    need = qv.plan(untied, profile="default", vram={}, prompt_len=64, max_new_tokens=8).estimate
    ram = need.weights + need.kv_cache + need.activations + 2**18
    with load(untied, prompt_len=64, max_new_tokens=8, ram=ram) as llm:
        llm.generate("hello", max_new_tokens=8)
        with pytest.raises(qv.DoesNotFitError, match="would fit") as caught:
            llm.generate(PROMPT * 20, max_new_tokens=8)
        assert caught.value.needed_bytes > caught.value.budget_bytes
        assert caught.value.nearest.prompt_len < 2000


def test_a_host_embedding_is_no_parameter_and_is_saved_all_the_same(untied, tmp_path):
    from transformers import AutoModelForCausalLM

    with load(untied, embeddings="host") as llm:
        names = {name for name, _ in llm.model.named_parameters()}
        assert "model.embed_tokens.weight" not in names
        llm.model.save_pretrained(tmp_path)
        kept = llm.model.get_input_embeddings().weight.clone()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, kept)


def test_a_pipeline_takes_the_model(untied):
    from transformers import pipeline

    model, tokenizer = load(untied, weights="fp32")
    generated = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "hello", max_new_tokens=4, return_full_text=False
    )
    assert isinstance(generated[0]["generated_text"], str)


@pytest.mark.parametrize("weights", ["fp32", "nf4", "int4", "int8-wo", "fp8"])
def test_peft_trains_an_adapter_on_the_model(untied, weights):
    peft = pytest.importorskip("peft")
    model, tokenizer = load(untied, weights=weights)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    inputs = tokenizer("hello world", return_tensors="pt")
    loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_a_preallocated_cache_works_with_the_models_own_generate(untied):
    with load(untied, weights="fp32") as llm:
        inputs = llm.tokenizer(PROMPT, return_tensors="pt")
        length = inputs["input_ids"].shape[1] + 8
        plain = llm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        ours = llm.model.generate(
            **inputs, max_new_tokens=8, do_sample=False, past_key_values=llm.new_cache(max_length=length)
        )
        assert torch.equal(plain, ours)


def test_beams_and_a_cache_of_ones_own_pass_through(untied):
    with load(untied, weights="fp32", cache="preallocated", attention="fused") as llm:
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        beams = llm.generate(PROMPT, num_beams=3, **options)
        assert llm.report().estimate.workload.batch_size == 3
        assert llm.report().measured["kv_cache"] == llm.report().estimate.kv_cache
        inputs = llm.tokenizer(PROMPT, return_tensors="pt")
        plain = llm.model.generate(**inputs, num_beams=3, **options)[:, inputs["input_ids"].shape[1] :]
        assert beams == llm.tokenizer.batch_decode(plain, skip_special_tokens=True)[0]
        own = llm.new_cache(max_length=400)
        assert llm.generate(PROMPT, past_key_values=own, **options)
        assert own.get_seq_length() == inputs["input_ids"].shape[1] + 5


def test_messages_of_another_kind_are_refused(untied):
    with load(untied) as llm:
        for message in (5, None, [], [{"role": "user"}], [{"role": "user", "content": None}], ["hi"]):
            with pytest.raises(qv.WorkloadError, match="message must be a text, or a list of"):
                llm.chat(message)
        with pytest.raises(qv.WorkloadError, match="system must be a text, got 5"):
            llm.chat("hi", system=5)


def test_a_checkpoint_without_a_usable_tokenizer_says_so(demo, tmp_path):
    folder = shutil.copytree(demo, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    with load(folder) as llm, pytest.raises(qv.CheckpointError, match=r"has no chat template; use generate\(\)"):
        llm.chat("hi")
    (folder / "tokenizer.json").write_text('{"broken')
    with pytest.raises(qv.CheckpointError, match="the tokenizer in .* cannot be read: .*json' is cut off in line 1"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with load(folder) as llm:
        assert llm.model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 3072)
        with pytest.raises(qv.CheckpointError, match=r"no tokenizer file found\): add the model's tokenizer.json"):
            llm.generate("hi")


def test_padding_that_was_not_planned_has_to_fit():
    knobs = {"profile": "default", "attention": "fused", "cache": "preallocated", "prefill_chunk_size": 4_096}
    work = {"prompt_len": 24_576, "max_new_tokens": 1_024, "batch_size": 4}
    plans = (qv.plan(SEVEN, **knobs, **work, vram="80GiB", padded=one) for one in (False, True))
    unpadded, padded = (plan.estimate.needed_bytes for plan in plans)
    assert padded > unpadded + 10**9  # the mask, its bias, and keys and values for every head
    for vram, in_full in ((padded, 25_600), (unpadded, None)):
        runs = Generations(qv.plan(SEVEN, **knobs, **work, vram=vram), {torch.device("cpu"): {}}, {}, None)
        workload = runs.plan.workload
        assert runs.limits.cache_length(workload) == 25_600
        assert runs.limits.cache_length(replace(workload, prompt_len=400, padded=True)) == 25_600
        if in_full:
            assert runs.limits.cache_length(replace(workload, padded=True)) == in_full
            continue
        with pytest.raises(qv.DoesNotFitError):
            runs.limits.cache_length(replace(workload, padded=True))
        # Not beside a cache of the planned length, but beside one of its own.
        assert runs.limits.cache_length(replace(workload, prompt_len=22_000, max_new_tokens=1, padded=True)) == 22_001


def test_beam_search_reorders_the_preallocated_cache(untied):
    with load(untied, weights="fp32") as llm:
        inputs = llm.tokenizer(PROMPT, return_tensors="pt")
        length = inputs["input_ids"].shape[1] + 8
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "eos_token_id": None}
        plain = llm.model.generate(**inputs, **options)
        ours = llm.model.generate(**inputs, **options, past_key_values=llm.new_cache(max_length=length))
        assert torch.equal(plain, ours)


def test_a_sharded_checkpoint_loads(sharded):
    with load(sharded) as llm:
        assert llm.report().measured["weights"] == llm.plan.estimate.weights


def test_cache_and_probe_of_no_tokens(untied):
    with qv.load(untied, profile="int4-flash", weights="bf16", prompt_len=16, max_new_tokens=4, progress=False) as llm:
        for length in (0, -1, 1.5, True):
            with pytest.raises(
                qv.WorkloadError, match="max_length must be a positive whole number of tokens, got"
            ) as caught:
                llm.new_cache(max_length=length)
            assert (caught.value.name, caught.value.got) == ("max_length", length)
        for name in ("prompt_len", "max_new_tokens", "batch_size"):
            with pytest.raises(qv.WorkloadError, match=f"{name} must be a positive whole number, got 0"):
                llm.probe(**{name: 0})
        with pytest.raises(qv.WorkloadError, match="must be a positive whole number, got -1"):
            llm.probe(steps=-1)
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        llm.new_cache(max_length=8)


@pytest.mark.parametrize(("frozen", "looks"), [(0, True), (375, True), (500_000, False)])
def test_what_the_interpreter_froze_is_no_reason_to_look_at_everything(monkeypatch, frozen, looks):
    done = []
    monkeypatch.setattr(garbage.gc, "get_freeze_count", lambda: frozen)
    monkeypatch.setattr(garbage.gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(garbage.gc, "unfreeze", lambda: done.append("unfreeze"))
    with garbage.garbage_of_this_load():
        pass
    assert done == (["freeze", "unfreeze"] if looks else [])
