"""Plans of fleets: the fewest GPUs that fulfil the wish, prices, alternatives, what is left out, and refusals."""

import json
import subprocess
import sys

import pytest

import qwen_vram as qv
from qwen_vram.fleet.engines import ENGINES
from qwen_vram.fleet.search import fewest_replicas
from qwen_vram.planning.vllm.memory import MARGIN
from qwen_vram.spec.cards.rows import GPUS
from tests.fleet.fleets import SEVEN, fleet, replica

CONFIG = {
    "model_type": "qwen2", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32_000,
    "num_key_value_heads": 2, "intermediate_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_best_is_the_one_with_the_fewest_gpus_and_every_option_fulfils_the_wish():
    plan = fleet("L4,RTX 3090,A100-80GB")
    assert [option.gpus for option in plan.options] == sorted(option.gpus for option in plan.options)
    assert plan.best is plan.options[0]
    assert plan.alternatives == plan.options[1:]
    # fp8 needs products in fp8, which only the L4 has.
    assert {(one.gpu, one.weights) for one in plan.options} == {
        ("L4", "bf16"), ("L4", "fp8"), ("RTX 3090", "bf16"), ("A100-80GB", "bf16"),
    }  # fmt: skip
    for option in plan.options:
        assert option.gpus == option.replicas * option.tensor_parallel
        assert option.service.share >= 0.95
        assert option.service.requests >= 1000
        assert option.service.first_token_seconds[99] >= option.service.first_token_seconds[50] > 0
        assert option.service.user_tokens_per_second[50] >= option.service.user_tokens_per_second[10] >= 20
        assert option.memory.total == GPUS[option.gpu].memory
        parts = option.memory._asdict()
        assert parts.pop("total") == sum(parts.values())
        assert min(parts.values()) >= 0


def test_one_replica_less_does_not_fulfil_the_wish():
    plan = fleet("L4", concurrent_users=150, weights="bf16", tensor_parallel=2)
    replicas = plan.best.replicas
    assert replicas > 2
    one = replica("L4", size=2, longest=(600, 512))
    fewer = fewest_replicas(plan.question, one, replicas - 1)
    assert fewer.replicas == 0
    assert fewer.tried == replicas - 1
    assert fewer.service.share < 0.95


@pytest.mark.parametrize(
    ("gpu", "weights"), [("RTX 4090", "bf16"), ("L4", "bf16"), ("RTX 4070", "fp8"), ("H200", "bf16")]
)
def test_a_replica_runs_as_many_sequences_as_its_cache_holds(gpu, weights):
    """Of the mean length: sequences take memory for their logits, which the cache then lacks."""
    one = replica(gpu, weights=weights, longest=(900, 124))
    assert one.limits.sequences == 256 or one.limits.sequences == one.limits.blocks * 16 // 1024
    assert one.memory.kv_cache // (one.limits.blocks + 1) == 16 * 57_344
    assert one.needed <= one.budget == int(0.92 * one.gpu.memory)
    left = one.budget - one.memory.kv_cache - one.memory.fixed
    assert MARGIN <= left < MARGIN + 16 * 57_344


def test_prices_decide_if_they_are_given():
    cards, asked = "L4,A100-80GB", {"concurrent_users": 10, "weights": "fp8"}
    with pytest.raises(qv.WorkloadError, match="prices must have every GPU that is compared, got none of A100-80GB"):
        fleet(cards, prices={"L4": 0.8}, **asked)
    both = {"concurrent_users": 10, "weights": "bf16"}
    by_number, by_price = fleet(cards, **both), fleet(cards, prices={"l4": 0.3, "a100": 9.0}, **both)
    assert (by_number.best.gpu, by_number.best.gpus) == ("A100-80GB", 1)
    assert by_price.best.gpu == "L4"
    assert by_price.best.price_per_hour == pytest.approx(0.3 * by_price.best.gpus)
    assert [one.price_per_hour for one in by_price.options] == sorted(one.price_per_hour for one in by_price.options)
    assert "per hour" in str(by_price)


def test_equal_seeds_give_equal_plans_and_arrivals_may_be_given():
    again = [fleet("L4", seed=seed, weights="fp8").to_dict() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    burst = fleet("A100-80GB", arrivals=[0.0] * 50 + [1.0], share=0.9, first_token_seconds=20)
    assert burst.best.service.requests == 51
    assert burst.question.to_dict()["arrivals"] == 51
    # All at once wait for each other: the last first token is later than the first.
    assert burst.best.service.first_token_seconds[99] > 2 * burst.best.service.first_token_seconds[50] / 1.5


def test_lengths_may_be_numbers_ranges_and_samples():
    plan = fleet("A100-80GB", prompt_len=(10, 3000), max_new_tokens=[20, 20, 400])
    asked = plan.to_dict()["asked"]
    assert asked["prompt_len"] == {"least": 10, "mean": 1505.0, "most": 3000, "samples": 0}
    assert asked["max_new_tokens"] == {"least": 20, "mean": pytest.approx(146.67, abs=0.01), "most": 400, "samples": 3}
    assert plan.question.longest == (3000, 400)


def test_more_users_and_a_slowdown_need_more():
    few, many, slow = (
        fleet("L4", weights="bf16", **changed)
        for changed in ({}, {"concurrent_users": 160}, {"concurrent_users": 160, "slowdown": 1.4})
    )
    assert few.best.gpus < many.best.gpus < slow.best.gpus
    assert many.best.service.total_tokens_per_second > 3 * few.best.service.total_tokens_per_second


def test_a_large_model_is_divided():
    plan = fleet("A100-80GB,H200", model="Qwen2.5-72B-Instruct", weights="bf16", concurrent_users=8)
    sizes = {one.gpu: one.tensor_parallel for one in plan.options}
    assert sizes["A100-80GB"] in (4, 8)
    assert sizes["H200"] in (2, 4, 8)
    assert all(one.memory.communication > 0 for one in plan.options)


def test_the_number_of_gpus_may_be_limited():
    with pytest.raises(qv.WishNotMetError) as refused:
        fleet({"L4": 2}, concurrent_users=200, weights="bf16")
    error = refused.value
    assert error.replicas * error.tensor_parallel <= 2
    assert (error.gpu, error.weights) == ("L4", "bf16")
    assert error.nearest.tokens_per_second < 20 or error.nearest.first_token_seconds > 2
    assert error.users > 10
    assert "no fleet of these GPUs gives 95% of the requests of Qwen/Qwen2.5-7B-Instruct 20.0 tokens/s" in str(error)
    assert f"x L4 fulfil it for {error.users} users; ask for that, or name more or faster GPUs" in str(error)
    # So it is: that number of users is planned with these GPUs, and two more are not.
    assert fleet({"L4": 2}, concurrent_users=error.users, weights="bf16").best.gpus == 2
    with pytest.raises(qv.WishNotMetError):
        fleet({"L4": 2}, concurrent_users=error.users + 2, weights="bf16")


def test_a_wish_that_is_too_fast_for_every_card_names_the_fastest():
    with pytest.raises(qv.WishNotMetError, match=r"4 x L4 with no other request give 95% of the requests") as refused:
        fleet("T4,L4", tokens_per_second=500)
    assert refused.value.replicas == 0
    assert 20 < refused.value.nearest.tokens_per_second < 500
    assert fleet("L4", tokens_per_second=20, first_token_seconds=0.5).best.service.share >= 0.95


def test_a_model_that_does_not_fit_gives_the_bytes():
    with pytest.raises(qv.DoesNotFitError, match="fits on none of RTX 4070, T4: with .* of weights") as refused:
        fleet("RTX 4070,T4", model="Qwen2.5-72B-Instruct", gpus_per_node=2)
    error = refused.value
    assert error.needed_bytes > error.budget_bytes > 10 * 2**30
    assert error.estimate.weights > 20 * 2**30
    assert error.nearest is None
    # Those that fit are planned, and the others are notes.
    plan = fleet("RTX 4070,H200", model="Qwen2.5-32B-Instruct", gpus_per_node=1, weights="bf16", concurrent_users=4)
    assert [one.gpu for one in plan.options] == ["H200"]
    assert any(note.startswith("RTX 4070 with bf16 is left out: a card of 1 x RTX 4070 needs") for note in plan.notes)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"concurrent_users": 0}, qv.WorkloadError, "concurrent_users must be a positive whole number, got 0"),
        ({"concurrent_users": 1.5}, qv.WorkloadError, "concurrent_users must be a positive whole number, got 1.5"),
        ({"tokens_per_second": 0}, qv.WorkloadError, "tokens_per_second must be a positive number, got 0"),
        ({"tokens_per_second": float("nan")}, qv.WorkloadError, "tokens_per_second must be a positive number, got nan"),
        ({"first_token_seconds": -1}, qv.WorkloadError, "first_token_seconds must be a positive number, got -1"),
        ({"share": 1.2}, qv.WorkloadError, "share must be at most 1, got 1.2"),
        ({"slowdown": 0}, qv.WorkloadError, "slowdown must be a positive number, got 0"),
        ({"prompt_len": 0}, qv.WorkloadError, r"prompt_len must be .* a tuple of two .*, or a list of samples; got 0"),
        ({"prompt_len": (9, 3)}, qv.WorkloadError, r"a range, \(shortest, longest\); got \(9, 3\)"),
        ({"max_new_tokens": []}, qv.WorkloadError, r"max_new_tokens must be a positive whole number.* got \[\]"),
        ({"prompt_len": 40_000}, qv.WorkloadError, "past the model's max_position_embeddings"),
        ({"tensor_parallel": 8}, qv.WorkloadError, "tensor_parallel 8 does not divide .* 28 heads, .* from 1, 2, 4"),
        ({"tensor_parallel": 16}, qv.WorkloadError, "tensor_parallel 16 is more than gpus_per_node 8"),
        ({"gpus_per_node": 0}, qv.WorkloadError, "gpus_per_node must be a positive whole number, got 0"),
        ({"arrivals": [1.0, 0.5]}, qv.WorkloadError, "arrivals must be at least two times in seconds, from 0,"),
        ({"engine": "tgi"}, qv.UnknownNameError, "unknown engine 'tgi'; choose from vllm, transformers"),
        ({"weights": "nf4"}, qv.UnknownNameError, "unknown weights for engine 'vllm' 'nf4'; choose from bf16, "),
        ({"gpus": []}, qv.WorkloadError, "gpus must name at least one GPU"),
        ({"gpus": {"L4": 0}}, qv.WorkloadError, r"gpus\['L4'\] must be a positive number of GPUs, got 0"),
        ({"gpus": "L5"}, qv.UnknownNameError, "unknown GPU 'L5'; choose from RTX 3060 12GB, "),
        ({"prices": {"L4": -1, "A100": 1}}, qv.WorkloadError, r"prices\['L4'\] must be a positive number, got -1"),
        ({"gpus": "A10", "weights": "fp8"}, qv.NotSupportedError, "A10 do not run fp8 with engine 'vllm'"),
        (
            {"engine": "transformers", "tensor_parallel": 2},
            qv.NotSupportedError,
            "engine 'transformers' has no tensor parallelism in this plan, got tensor_parallel=2",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_refused_with_what_is_allowed(changed, error, text):
    with pytest.raises(error, match=text):
        fleet(**{"gpus": "L4,A100-80GB", **changed})


def test_transformers_serves_its_own_formats_on_one_gpu():
    plan = fleet("RTX 4090", engine="transformers", concurrent_users=4, tokens_per_second=5)
    assert {one.weights for one in plan.options} == {"bf16", "int8", "nf4"}
    assert {one.tensor_parallel for one in plan.options} == {1}
    assert plan.best.limits.block_tokens == ENGINES["transformers"].block_tokens == 256


def test_a_card_without_bf16_takes_fp16():
    assert {one.weights for one in fleet("T4", concurrent_users=2).options} == {"fp16"}


def test_a_config_is_planned_and_has_no_command():
    plan = fleet("L4", model=CONFIG, concurrent_users=3)
    assert plan.model is None
    with pytest.raises(qv.NotSupportedError, match="a server opens a checkpoint, and this plan is of a config"):
        plan.commands()


def test_the_text_fits_80_columns_and_the_data_is_json():
    plan = fleet(
        "A100-80GB,RTX PRO 6000", concurrent_users=1000, weights="bf16", prices={"A100": 1.9, "RTX PRO 6000": 1}
    )
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 80
    assert "for 1,000 users, vllm" in text
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["best"]["gpus"] == plan.best.gpus
    assert data["asked"]["concurrent_users"] == 1000
    assert data["best"]["service"]["first_token_seconds"].keys() == {"p50", "p90", "p99"}


def test_a_plan_loads_the_standard_library_alone():
    code = (
        "import sys, qwen_vram as qv\n"
        f"qv.plan_fleet({SEVEN!r}, 'L4', concurrent_users=4, tokens_per_second=5)\n"
        "known = sys.stdlib_module_names | {'qwen_vram', '__main__'}\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - known))"
    )
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "[]\n"
