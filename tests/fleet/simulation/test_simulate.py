"""The simulation of a replica against closed forms: one request, saturation, Little's law, M/D/1, and its own steps."""

from random import Random

import pytest

from qwen_vram.fleet.simulation.lengths import distribution
from qwen_vram.fleet.simulation.simulate import Limits, largest_below, simulate
from qwen_vram.fleet.simulation.traffic import Request, poisson
from tests.fleet.fleets import replica

ONE = distribution(1, "new")


def limits(**changed):
    return Limits(blocks=10_000, block_tokens=16, sequences=256, step_tokens=2048)._replace(**changed)


class Constant:
    """Times of an imaginary engine that the closed forms of queues need: a step takes the same time always."""

    token_seconds = 0.0

    def __init__(self, step):
        self.step = step

    def seconds(self, decoding, tokens, chunks=(), ending=0):
        return self.step


@pytest.mark.parametrize(("prompt", "new"), [(100, 1), (2048, 50), (5000, 300)])
def test_a_request_alone_takes_the_sum_of_its_steps(prompt, new):
    one = replica("L4")
    run = simulate([Request(3.0, prompt, new)], one.times, limits())
    first, past = 3.0, 0
    while past < prompt:
        chunk = min(2048, prompt - past)
        first += one.times.seconds(0, 0, [(chunk, past)], int(past + chunk == prompt))
        past += chunk
    steps = [one.times.seconds(1, prompt + 1 + number) for number in range(new - 1)]
    assert run.served[0].first == pytest.approx(first, rel=1e-12)
    assert run.served[0].last == pytest.approx(first + sum(steps), rel=1e-9)
    assert run.steps == -(-prompt // 2048) + new - 1
    assert run.busy == pytest.approx(run.seconds - 3.0)


def test_saturated_throughput_is_that_of_one_round():
    """Equal requests that all wait run in rounds of equal length: a prefill of each, then steps of all."""
    one, sequences, prompt, new, rounds = replica("A100-80GB"), 32, 64, 100, 5
    run = simulate([Request(0.0, prompt, new)] * (sequences * rounds), one.times, limits(sequences=sequences))
    prefill = one.times.seconds(0, 0, [(prompt, 0)] * sequences, sequences)
    tokens = [sequences * (prompt + 1 + number) for number in range(new - 1)]
    once = prefill + sum(one.times.seconds(sequences, number) for number in tokens)
    assert run.seconds == pytest.approx(rounds * once, rel=1e-9)
    assert run.most_sequences == sequences
    assert run.most_blocks == sequences * -(-(prompt + new) // 16)


@pytest.mark.parametrize("blocks", [10_000, 400])
def test_littles_law(blocks):
    """The mean number of requests in the replica is their rate times their mean time there, waiting included."""
    prompts, answers = distribution((20, 3000), "prompt"), distribution((1, 400), "new")
    requests = poisson(5.0, 600, prompts, answers, seed=3)
    run = simulate(requests, replica("L4").times, limits(blocks=blocks))
    times = [one.last - one.request.arrival for one in run.served]
    rate = len(times) / run.seconds
    assert run.request_seconds / run.seconds == pytest.approx(rate * sum(times) / len(times), rel=1e-9)
    assert run.most_blocks <= blocks


@pytest.mark.parametrize("load", [0.5, pytest.param(0.7, marks=pytest.mark.full)])
def test_waiting_time_of_an_m_d_1_queue(load):
    """Requests of one step each, one at a time: the formula of Pollaczek and Khinchine."""
    service = 0.05
    requests = poisson(load / service, 25_000 if load < 0.6 else 60_000, distribution(10, "prompt"), ONE, seed=11)
    run = simulate(requests, Constant(service), limits(sequences=1))
    waits = [one.first - one.request.arrival - service for one in run.served]
    assert min(waits) > -1e-9
    assert sum(waits) / len(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)
    assert run.busy / run.seconds == pytest.approx(load, rel=0.02)


def stepwise(requests, times, bounds):
    """The same scheduler, one step at a time, without jumps to the next event, as an independent oracle."""
    now, number, waiting, running = 0.0, 0, [], []
    first, last = {}, {}
    while len(last) < len(requests):
        while number < len(requests) and requests[number].arrival <= now:
            waiting.append(number)
            number += 1
        decoding = [one for one in running if one["fed"] == one["request"].prompt_len]
        budget = bounds.step_tokens - len(decoding)
        left = budget - sum(one["request"].prompt_len - one["fed"] for one in running)
        while waiting and left > 0 and len(running) < bounds.sequences:
            request = requests[waiting[0]]
            blocks = sum(bounds.blocks_of(one["request"].prompt_len + one["request"].new_tokens) for one in running)
            if blocks + bounds.blocks_of(request.prompt_len + request.new_tokens) > bounds.blocks:
                break
            running.append({"number": waiting.pop(0), "request": request, "fed": 0, "made": 0})
            left -= request.prompt_len
        if not running:
            now = requests[number].arrival
            continue
        chunks, ending = [], []
        for one in running:
            new = min(budget, one["request"].prompt_len - one["fed"])
            if new and one not in decoding:
                chunks.append((new, one["fed"]))
                one["fed"] += new
                budget -= new
                if one["fed"] == one["request"].prompt_len:
                    ending.append(one)
        tokens = sum(one["request"].prompt_len + one["made"] for one in decoding)
        now += times.seconds(len(decoding), tokens, chunks, len(ending))
        for one in (*decoding, *ending):
            one["made"] += 1
            first.setdefault(one["number"], now)
            if one["made"] == one["request"].new_tokens:
                last[one["number"]] = now
                running.remove(one)
    return [(first[one], last[one]) for one in range(len(requests))]


@pytest.mark.parametrize("seed", range(6))
def test_jumps_over_steps_change_nothing(seed):
    random = Random(seed)
    bounds = limits(
        blocks=random.choice([150, 400, 5000]),
        sequences=random.choice([3, 16, 256]),
        step_tokens=random.choice([300, 2048]),
    )
    requests = poisson(random.choice([1, 8]), 60, distribution((1, 900), "p"), distribution((1, 120), "n"), seed=seed)
    one = replica(random.choice(["L4", "H200"]))
    run = simulate(requests, one.times, bounds)
    expected = stepwise(requests, one.times, bounds)
    for served, (first, last) in zip(run.served, expected, strict=True):
        assert served.first == pytest.approx(first, rel=1e-9)
        assert served.last == pytest.approx(last, rel=1e-9)


def test_equal_seeds_give_equal_requests_and_replicas_differ():
    lengths = distribution((1, 50), "p"), distribution([3, 5, 9], "n")
    again = [poisson(2.0, 50, *lengths, seed=5, replica=number) for number in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert {one.new_tokens for one in again[0]} == {3, 5, 9}


def test_largest_below():
    assert [largest_below(10, most.__ge__) for most in (-1, 0, 3, 10, 99)] == [0, 0, 3, 10, 10]
