"""The loader on a GPU: run with `pytest -m gpu` where there is one."""

import weakref

import pytest
import torch

import qwen_vram as qv
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.attention.fused import fused_attention

pytestmark = pytest.mark.gpu

SAVERS = [
    {"attention": "sdpa"},
    {"attention": "eager"},
    {"attention": "fused", "cache": "preallocated"},
    {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 64},
    {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 64, "embeddings": "host"},
    {"attention": "sdpa", "cache": "static"},
]
QUESTIONS = [example for name in ("math", "recall") for example in examples(name, "held_out", seed=7, count=5)]


@pytest.mark.parametrize(
    "weights", ["bf16", "fp16", "nf4", "nf4-plain", "fp4", "fp4-plain", "int8", "int4", "int8-wo", "fp8"]
)
def test_weights_take_the_predicted_bytes_on_the_device(demo, weights):
    with qv.load(demo, profile="default", weights=weights, progress=False) as llm:
        assert llm.device.type == "cuda"
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
        assert llm.report().measured["load_peak"] == pytest.approx(llm.plan.estimate.load_peak, rel=0.05, abs=2**21)


@pytest.mark.parametrize("knobs", SAVERS, ids=str)
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int4", "int8-wo", "fp8"])
def test_every_saver_answers_right_and_takes_what_was_promised(demo, weights, knobs):
    with qv.load(demo, profile="default", weights=weights, prompt_len=3_000, progress=False, **knobs) as llm:
        for example in QUESTIONS:
            assert llm.chat(example.prompt, max_new_tokens=64, do_sample=False) == example.answer
        # Segments that earlier questions left stay reserved, so the promise is the plan's, for its longest prompt.
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["peak_allocated"] <= 1.01 * promised.peak_allocated
        assert measured["process_total"] <= 1.01 * promised.process_total


def test_decode_steps_run_the_flash_kernel_and_answer_alike(demo):
    """sdpa would choose cuDNN on Hopper, which builds a graph for every new length."""
    work = {"prompt_len": 700, "max_new_tokens": 40, "attention": "fused", "cache": "preallocated"}
    with qv.load(demo, profile="default", progress=False, **work) as llm:
        ids = torch.randint(1_000, 2_000, (1, 700), generator=torch.Generator().manual_seed(0)).cuda()
        cache = llm.new_cache(max_length=740)
        with torch.inference_mode():
            ids = llm.model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
                llm.model(input_ids=ids, past_key_values=cache)
                torch.cuda.synchronize()
        kernels = {event.name for event in profiler.events()}
        assert any("flash" in name for name in kernels)
        assert not any("cudnn" in name for name in kernels)
        prompt = "The quick brown fox jumps over the lazy dog. " * 8
        answers = [llm.generate([prompt], max_new_tokens=40, do_sample=False) for _ in range(5)]
        assert all(answer == answers[0] for answer in answers)


def test_padded_batches_take_the_masked_path(demo):
    prompts = [example.prompt for example in QUESTIONS[:3]]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = []
    for attention in ("sdpa", "fused"):
        with qv.load(demo, profile="default", attention=attention, batch_size=3, progress=False) as llm:
            texts = [llm.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
            answers.append(llm.generate(texts, max_new_tokens=64, do_sample=False))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("knobs", [{}, {"prefill_chunk_size": 256}, {"kv_cache": "int8"}], ids=str)
def test_padded_batches_take_what_was_promised_and_answer_alike(wide, knobs):
    settings = {"attention": "fused", "cache": "preallocated", "batch_size": 4, **knobs}
    texts = ["word " * count for count in (1_001, 700, 90, 3)]
    with qv.load(wide, profile="default", prompt_len=1_100, max_new_tokens=60, progress=False, **settings) as llm:
        answers = [llm.generate(texts, max_new_tokens=60, do_sample=False) for _ in range(5)]
        report = llm.report()
        assert report.estimate.workload.padded
        promised, measured = report.estimate.peak_allocated, report.measured["peak_allocated"]
        assert measured == pytest.approx(promised, rel=0.005)
        assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_mask_means_what_it_means_to_sdpa(queries):
    torch.manual_seed(0)
    query = torch.randn(3, 14, queries, 64, dtype=torch.bfloat16, device="cuda")
    key, value = (torch.randn(3, 2, 101, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    mask = (
        torch.ones(queries, 101, dtype=torch.bool, device="cuda").tril(101 - queries).expand(3, 1, queries, 101).clone()
    )
    mask[0, ..., :30] = mask[1, ..., :7] = False
    found, _ = fused_attention(torch.nn.Module(), query, key, value, mask, scaling=0.125)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.125, enable_gqa=True
    )
    assert found.shape == (3, queries, 14, 64)
    assert found.is_contiguous()
    assert torch.allclose(found.double(), wanted.transpose(1, 2), atol=0.01)


@pytest.mark.parametrize("queries", [1, 40])
def test_what_the_kernel_does_not_check_goes_to_sdpa(queries):
    """Masks with heads of their own, and dtypes that autocast has mixed."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 7
    query = torch.randn(1, 14, queries, 64, device="cuda")
    key, value = (torch.randn(1, 2, 101, 64, device="cuda") for _ in range(2))
    masks = torch.ones(1, 14, queries, 101, dtype=torch.bool, device="cuda").tril(101 - queries)
    masks[:, :3, :, :30] = False
    for mask in (masks, masks[:, :1]):
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), attn_mask=mask, scale=0.125, enable_gqa=True
        ).transpose(1, 2)
        halves = [states.bfloat16() for states in (query, key, value)]
        found, _ = fused_attention(module, *halves, mask, scaling=0.125)
        assert torch.allclose(found.double(), wanted, atol=0.02)
        with torch.autocast("cuda", torch.float16):
            found, _ = fused_attention(module, query, key, value.half(), mask, scaling=0.125)
        assert torch.allclose(found.double(), wanted, atol=0.01)


def test_a_masked_product_trains_as_sdpa_does():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 24, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool, device="cuda").tril()
    mask[0, ..., :5] = False
    mask |= torch.eye(24, dtype=torch.bool, device="cuda")
    gradients = []
    for attend in (
        lambda *states: fused_attention(torch.nn.Module(), *states, mask, scaling=0.125)[0].transpose(1, 2),
        lambda *states: torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask, scale=0.125),
    ):
        trained = value.clone().requires_grad_()  # as where an adapter is on the values alone
        attend(query, key, trained).float().square().sum().backward()
        gradients.append(trained.grad)
    assert torch.allclose(*gradients, atol=0.05, rtol=0.05)


def test_longer_and_longer_chats_reserve_no_more_than_was_promised(wide):
    work = {"prompt_len": 3_900, "max_new_tokens": 8, "attention": "fused", "cache": "preallocated"}
    with qv.load(wide, profile="default", prefill_chunk_size=512, progress=False, **work) as llm:
        for count in range(300, 3_900, 300):
            llm.generate(["word " * count], max_new_tokens=8, do_sample=False)
        # What shorter chunks left may not fit longer ones; a cache of each length would leave 244 MB.
        assert llm.report().measured["peak_reserved"] <= llm.plan.estimate.peak_reserved + 2**24


def test_a_model_that_was_dropped_is_gone_before_the_next_plan(wide):
    llm = qv.load(wide, profile="default", progress=False)
    llm.model.owner = llm  # a circle, which only the collector finds
    model = weakref.ref(llm.model)
    del llm
    assert model() is not None
    assert torch.cuda.memory_allocated() > 2**26
    with qv.load(wide, profile="default", progress=False):
        assert model() is None


def test_closing_gives_the_memory_back(demo):
    before = torch.cuda.memory_allocated()
    llm = qv.load(demo, profile="int4-flash", progress=False)
    llm.chat("What is 12 + 30?", max_new_tokens=16, do_sample=False)
    llm.close()
    # cuBLAS keeps its workspace.
    assert torch.cuda.memory_allocated() - before <= 2 * 34_603_008


@pytest.mark.parametrize("knobs", SAVERS, ids=str)
def test_a_plan_is_verified_on_the_device(demo, knobs):
    with qv.load(demo, profile="default", prompt_len=3_000, progress=False, verify=True, **knobs) as llm:
        assert llm.report().measured["peak_allocated"] <= llm.plan.estimate.peak_allocated * 1.01 + 2**21


def test_a_plan_whose_memory_is_gone_is_refused(demo):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60 * 2**20) / total)
    try:
        with pytest.raises(qv.PlanNotHeldError, match="memory ran out at the planned workload"):
            qv.load(demo, profile="default", attention="eager", prompt_len=3_000, progress=False, verify=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
