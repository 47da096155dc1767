"""Replicas and plans that several tests of fleets use."""

from functools import cache

from qwen_vram.fleet.engines import ENGINES
from qwen_vram.fleet.plan import plan_fleet
from qwen_vram.fleet.replica import make_replica
from qwen_vram.spec.cards.find import find_gpu
from qwen_vram.spec.catalog import find

SEVEN = "Qwen2.5-7B-Instruct"


@cache
def replica(gpu, model=SEVEN, weights="bf16", size=1, engine="vllm", longest=(2000, 500), slowdown=1.0):
    """A replica of a catalog model."""
    return make_replica(
        model,
        find(model),
        ENGINES[engine],
        find_gpu(gpu),
        weights,
        size,
        longest=longest,
        mean_tokens=sum(longest),
        sequences=ENGINES[engine].sequences,
        step_tokens=ENGINES[engine].step_tokens,
        slowdown=slowdown,
    )


def fleet(gpus="L4,A100-80GB", model=SEVEN, **changed):
    """A plan for 40 users, if nothing else is said."""
    return plan_fleet(model, gpus, **{"concurrent_users": 40, "tokens_per_second": 20, "prompt_len": 600, **changed})
