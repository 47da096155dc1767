"""What a caller asks of one generation beside the plan is counted, or refused by name, before anything is allocated."""

import pytest
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

import qwen_vram as qv
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.generation.asked import Asked

QUESTION = "What is 12 + 30?"
GREEDY = {"do_sample": False, "max_new_tokens": 8}
ROOM = {"attention": "fused", "cache": "preallocated"}


def load(demo, **more):
    settings = {"profile": "default", "progress": False, "prompt_len": 60, "max_new_tokens": 8}
    return qv.load(demo, **{**settings, **more})


@pytest.fixture(scope="module")
def llm(demo):
    with load(demo, **ROOM, kv_cache="int8") as llm:
        yield llm


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("output_scores", True, "it keeps a tensor for each new token"),
        ("output_logits", True, "it keeps a tensor for each new token"),
        ("output_attentions", True, "it keeps a tensor for each new token"),
        ("output_hidden_states", True, "it keeps a tensor for each new token"),
        ("return_dict_in_generate", True, "return text alone"),
        ("use_cache", False, "each step would run the whole context in one piece"),
        ("guidance_scale", 1.5, "it runs the prompt a second time with a cache of its own"),
        ("cache_implementation", "quantized", "use 'dynamic' or 'static', or load with kv_cache='int8'"),
        ("cache_implementation", "offloaded", "use 'dynamic' or 'static', or load with kv_cache='int8'"),
    ],
)
def test_what_no_plan_counts_is_refused_by_name(llm, name, value, reason):
    passed = [{name: value}]
    if name not in ("use_cache", "guidance_scale"):
        passed.append({"generation_config": GenerationConfig(**{name: value, "do_sample": False})})
    for options in passed:
        for call in (llm.chat, llm.generate, lambda *args, **more: list(llm.stream(*args, **more))):
            with pytest.raises(qv.NotSupportedError, match=f"^{name}=.*is not supported here: .*") as caught:
                call(QUESTION, max_new_tokens=4, **options)
            assert reason in str(caught.value)
            assert "llm.model.generate() takes it, outside of what the plan promises" in str(caught.value)
            assert (caught.value.knob, caught.value.value) == (name, value)


def test_an_assistant_and_caches_of_other_kinds_are_refused_by_name(llm):
    with pytest.raises(qv.NotSupportedError, match="assistant_model=Qwen2ForCausalLM is not supported here: the plan"):
        llm.chat(QUESTION, assistant_model=llm.model)
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), DynamicCache(offloading=True)):
        with pytest.raises(
            qv.NotSupportedError, match=r"past_key_values is a \w+ that the plan does not count; use Loa"
        ):
            llm.chat(QUESTION, past_key_values=cache)


def test_options_that_change_nothing_are_not_refused(llm):
    expected = llm.chat(QUESTION, **GREEDY)
    plain = {"output_scores": False, "output_logits": None, "use_cache": True, "guidance_scale": 1.0}
    assert llm.chat(QUESTION, **plain, return_dict_in_generate=False, **GREEDY) == expected


def test_what_the_file_asks_to_return_is_not_kept(demo):
    with load(demo) as llm:
        expected = llm.chat(QUESTION, **GREEDY)
        llm.model.generation_config.output_logits = llm.model.generation_config.output_hidden_states = True
        llm.model.generation_config.cache_implementation = "static"
        assert llm.chat(QUESTION, **GREEDY) == expected


@pytest.mark.parametrize("knobs", [{}, ROOM, {**ROOM, "kv_device": "host"}, {"cache": "static"}], ids=str)
def test_caches_of_the_caller_that_fit_are_used(demo, knobs):
    with load(demo, **knobs) as llm:
        expected = llm.chat(QUESTION, **GREEDY)
        config = llm.model.config
        own = (DynamicCache(config=config), StaticCache(config=config, max_cache_len=80), llm.new_cache(max_length=80))
        for cache in own:
            assert llm.chat(QUESTION, past_key_values=cache, **GREEDY) == expected
            assert cache.get_seq_length() > 10
        for name in ("dynamic", "static"):
            assert llm.chat(QUESTION, cache_implementation=name, **GREEDY) == expected


def test_caches_of_the_caller_that_do_not_fit_are_refused(demo):
    need = qv.plan(demo, profile="default", vram={}, prompt_len=60, max_new_tokens=8, **ROOM, kv_cache="int4").estimate
    ram = need.weights + need.kv_cache + need.activations + 2**14
    with load(demo, **ROOM, kv_cache="int4", ram=ram) as llm:
        expected = llm.chat(QUESTION, **GREEDY)
        wide = llm.new_cache(max_length=3000)
        for options in (
            {"past_key_values": wide},
            {"past_key_values": StaticCache(config=llm.model.config, max_cache_len=3000)},
        ):
            with pytest.raises(qv.DoesNotFitError) as caught:
                llm.chat(QUESTION, **options, **GREEDY)
            assert caught.value.needed_bytes > caught.value.budget_bytes
        assert not any(layer.is_initialized for layer in wide.layers)
        assert llm.chat(QUESTION, past_key_values=llm.new_cache(max_length=60), **GREEDY) == expected


def test_sequences_of_a_generation_config_are_counted(demo):
    with load(demo, batch_size=1) as llm:
        for options in (
            {"generation_config": GenerationConfig(num_beams=3, do_sample=False)},
            {"num_beams": 3, "do_sample": False},
            {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
        ):
            llm.generate(QUESTION, max_new_tokens=4, **options)
            count = 2 if options.get("generation_config") and not options["generation_config"].num_beams else 3
            assert llm.report().estimate.workload.batch_size == count


def test_a_larger_chunk_than_planned_is_held_against_the_budget(demo):
    work = {"prompt_len": 400, "max_new_tokens": 4}
    small, large = (
        qv.plan(demo, profile="default", vram={}, prefill_chunk_size=chunk, **ROOM, **work).estimate
        for chunk in (100, 400)
    )
    assert large.activations > small.activations + 2**16
    ram = small.weights + small.kv_cache + (small.activations + large.activations) // 2
    with load(demo, **ROOM, prefill_chunk_size=100, ram=ram, **work) as llm:
        prompt, greedy = "word " * 380, {"do_sample": False, "max_new_tokens": 4}
        expected = llm.generate(prompt, **greedy)
        with pytest.raises(qv.DoesNotFitError):
            llm.generate(prompt, prefill_chunk_size=400, **greedy)
        assert llm.generate(prompt, prefill_chunk_size=50, **greedy) == expected


def test_compiled_plans_count_no_second_cache(demo):
    with load(demo, **ROOM) as llm:
        decode_by_steps(llm.model)
        llm._generations.decoder = Decoder(llm.model, batch_size=1, max_length=68, backend=None)
        expected = llm.chat(QUESTION, **GREEDY)
        assert llm.chat(QUESTION, past_key_values=llm.new_cache(max_length=68), **GREEDY) == expected
        profile = llm.plan.profile.replace(compiled=True)
        for options in ({"past_key_values": DynamicCache()}, {"cache_implementation": "dynamic"}):
            with pytest.raises(
                qv.NotSupportedError, match="a plan with compiled=True keeps the memory of its own cache"
            ):
                Asked(llm.model, options).profile(profile)
        assert Asked(llm.model, {"past_key_values": llm.new_cache(max_length=9)}).profile(profile) == profile


def test_a_callers_cache_takes_the_place_of_captured_steps(demo):
    with load(demo, **ROOM) as llm:
        decode_by_steps(llm.model)
        decoder = llm._generations.decoder = Decoder(llm.model, batch_size=1, max_length=68, backend=None)
        expected = llm.chat(QUESTION, **GREEDY)
        assert decoder._home is not None
        profile = llm.plan.profile.replace(captured=True)
        for kind, options in (
            ("dynamic", {"past_key_values": DynamicCache()}),
            ("static", {"cache_implementation": "static"}),
        ):
            found = Asked(llm.model, options).profile(profile)
            assert (found.captured, found.cache) == (False, kind)
            assert llm.chat(QUESTION, **options, **GREEDY) == expected
            assert decoder._home is None
            assert llm.chat(QUESTION, **GREEDY) == expected
            assert decoder._home is not None
        assert Asked(llm.model, {"past_key_values": llm.new_cache(max_length=9)}).profile(profile) == profile
