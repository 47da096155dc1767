"""`plan_fleet()`: the GPUs, their number, format and division for a number of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_vram.arithmetic.tensor_parallel import shard, sizes_of
from qwen_vram.checkpoints.resolve import ModelLike, resolve_model
from qwen_vram.fleet.data import FleetOption
from qwen_vram.fleet.engines import EngineName, engine_called, formats_of
from qwen_vram.fleet.options import Options
from qwen_vram.fleet.question import GpusLike, Question, cards_of, positive, rate_of, sizes_asked, undivided, wish_of
from qwen_vram.fleet.result import FleetPlan
from qwen_vram.fleet.simulation.lengths import Lengths, distribution
from qwen_vram.spec.workload import Workload


def plan_fleet(
    model: ModelLike,
    gpus: GpusLike,
    *,
    concurrent_users: int,
    tokens_per_second: float,
    prompt_len: Lengths = 512,
    max_new_tokens: Lengths = 512,
    first_token_seconds: float = 2.0,
    share: float = 0.95,
    engine: EngineName = "vllm",
    weights: str | tuple[str, ...] | None = None,
    tensor_parallel: int | None = None,
    gpus_per_node: int = 8,
    prices: Mapping[str, float] | None = None,
    arrivals: Sequence[float] | None = None,
    slowdown: float = 1.0,
    seed: int = 0,
) -> FleetPlan:
    """Find the fewest GPUs that serve a number of users, by arithmetic and a simulation of the requests.

    For each GPU and each format of weights it finds the division and the number of replicas with the fewest GPUs. A
    simulation of random arrivals then shows that enough requests get what their users wish. No GPU is needed.

    Args:
        model: As for `estimate_vram`. Manifests need a hub id or a folder.
        gpus: Names from the table of cards, as a list or with commas; or the number of each that there are, by name.
        concurrent_users: Users who wait for an answer at once. Each sends a request, reads the answer at the wished
            rate, and sends the next one.
        tokens_per_second: The least rate of new tokens for each user, after the first token.
        prompt_len, max_new_tokens: Tokens of a prompt and of an answer: a number, a tuple of the shortest and the
            longest, or a list of samples.
        first_token_seconds: The most seconds to the first token. The default is the limit of MLPerf's server scenario
            for Llama 2 70B (github.com/mlcommons/inference_policies).
        share: The least share of requests that get both.
        engine: `"vllm"`, or `"transformers"` (`transformers serve --continuous-batching`).
        weights: A format or several; `None` compares the model's own dtype with the quantizations of the engine.
        tensor_parallel: GPUs of one replica; `None` is searched, up to `gpus_per_node`.
        gpus_per_node: GPUs of one machine. A replica is on one machine.
        prices: The price of a GPU for an hour, by name. The cheapest fleet is then first.
        arrivals: The seconds at which requests arrive, instead of random times.
        slowdown: A factor of all predicted times, to plan with a margin; docs/fleet.md compares them with published
            ones.
        seed: The seed of arrivals and lengths. Equal arguments give equal plans.

    Raises:
        DoesNotFitError: the model fits on none of the GPUs, with the bytes of the nearest.
        WishNotMetError: no number of replicas fulfils the wish, with the nearest that can be fulfilled.
        UnknownNameError: a GPU, engine or format that is not known.
        WorkloadError: a number out of range, or a division that does not divide the heads.
        ConfigError, CheckpointError, HubError, NotSupportedError: the model cannot be counted, or the engine does not
            run it.

    Example:
        >>> plan = plan_fleet("Qwen2.5-7B-Instruct", "L4,H200", concurrent_users=8, tokens_per_second=10)
        >>> plan.best.gpu, plan.best.gpus
        ('H200', 1)
    """
    running = engine_called(engine)
    prompts, answers = distribution(prompt_len, "prompt_len"), distribution(max_new_tokens, "max_new_tokens")
    wish = wish_of(tokens_per_second, first_token_seconds, share)
    rate = rate_of(concurrent_users, arrivals, wish, answers)
    cards = cards_of(gpus, prices)
    label, architecture = resolve_model(model)
    Workload(prompt_len=prompts.most, max_new_tokens=answers.most).check(architecture)
    sizes = sizes_asked(tensor_parallel, sizes_of(architecture, gpus_per_node), gpus_per_node)
    if not running.divides:
        sizes = undivided(running, tensor_parallel)
    shard(architecture, max(sizes))  # refuses a division before the search
    formats = formats_of(running, architecture, weights)
    question = Question(
        label=label,
        architecture=architecture,
        engine=running,
        wish=wish,
        users=concurrent_users,
        rate=rate,
        prompts=prompts,
        answers=answers,
        arrivals=None if arrivals is None else tuple(map(float, arrivals)),
        slowdown=positive("slowdown", slowdown),
        seed=seed,
    )
    found = Options(question, cards, formats, sizes)
    options = sorted(found.all(), key=lambda option: _order(option, formats))
    if not options:
        raise found.refusal()
    return FleetPlan(
        model=str(model) if isinstance(model, (str, Path)) else None,
        label=label,
        engine=running,
        question=question,
        gpus_per_node=gpus_per_node,
        options=tuple(options),
        notes=tuple(found.notes),
    )


def _order(option: FleetOption, formats: Sequence[str]) -> tuple[float, int, int, float]:
    """Return the key that puts the cheapest first, then the fewest GPUs, the least lossy format, the fastest users."""
    cost = option.price_per_hour if option.price_per_hour is not None else float(option.gpus)
    return cost, option.gpus, formats.index(option.weights), -option.service.user_tokens_per_second[50]
