"""Predicted times against every row with a time of a decode step or a prefill in benchmarks/results."""

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qwen_vram as qv
from qwen_vram.arithmetic.timing import few_rows as timing_few_rows
from qwen_vram.arithmetic.timing.decode import decode_ms
from qwen_vram.arithmetic.timing.generation import generation_ms, predict_times
from qwen_vram.arithmetic.timing.prefill import first_token_ms
from qwen_vram.cli import app
from qwen_vram.demo import CHECKPOINT
from qwen_vram.spec.catalog import find
from qwen_vram.spec.formats import FORMAT_NAMES, FORMATS
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.workload import Workload

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FUSED = {"attention": "fused", "kernels": "fused", "cache": "preallocated"}
# Rates that were measured on the H100 before its runs; whatever else it has is the stated default, as of the H200.
H100 = DEFAULT._replace(
    device="NVIDIA H100 80GB HBM3",
    device_bandwidth=2_970_000_000_000,
    pinned_copy_rate=54_700_000_000,
    host_product_rate=78_220_399_970,
    host_4bit_rate=47_964_979_418,
)


@cache
def rows(name):
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def machine_of(row):
    return H100 if row["device"] == H100.device else DEFAULT


def case(name, number, row, knobs, work, decode, prefill=None, **other):
    """A row's label, what is predicted for it, and the measured milliseconds of a token and of the prefill."""
    known = other.get("architecture") or find(f"{row['cell']['model']}-Instruct")
    machine = other.get("machine") or machine_of(row)
    what = (known, qv.Profile(**knobs), Workload(**work), machine)
    return f"{name} {number}", what, other.get("on_cpu", False), decode, prefill


def decoding():
    for number, row in enumerate(rows("decode")):
        knobs = {name: value for name, value in row["cell"].items() if name not in ("model", "by")}
        yield case("decode", number, row, knobs, {"prompt_len": 512, "max_new_tokens": 144}, row["ms_per_token"])


def streaming():
    for name in ("streaming_speed", "streaming_host"):
        for number, row in enumerate(rows(name)):
            # The last row of the first is of two slots, which are three now; accelerate's are another program's.
            if row["cell"]["by"] == "ours":
                knobs = {name: value for name, value in row["cell"].items() if name not in ("model", "by", "slots")}
                knobs |= {"attention": "fused", "cache": "preallocated"}
                work = {"prompt_len": 512, "max_new_tokens": 34}
                yield case(name, number, row, knobs, work, row["ms_per_token"])


def small_cards():
    for number, row in enumerate(rows("streaming_caps")):
        # The call that the row holds, without what is no knob of a profile.
        call = row["call"].partition("batch_size=1, ")[2].rstrip(")")
        knobs = {name: eval(value) for name, value in (one.split("=") for one in call.split(", "))}
        work = {name: row["cell"][name] for name in ("prompt_len", "max_new_tokens")}
        yield case("streaming_caps", number, row, knobs, work, row["ms_per_token"], 1_000 * row["prefill_s"])


def caches():
    for number, row in enumerate(rows("kv_formats")):
        cell = row["cell"]
        knobs = {name: cell[name] for name in ("kv_cache", "kv_device") if name in cell}
        knobs |= {"attention": "fused", "cache": "preallocated"}
        work = {name: cell[name] for name in ("prompt_len", "max_new_tokens")}
        yield case("kv_formats", number, row, knobs, work, row["ms_per_token"], 1_000 * row["prefill_s"])


def chunks():
    for number, row in enumerate(rows("caps_chunks")):
        work = {"prompt_len": row["cell"]["prompt_len"], "max_new_tokens": 1}
        yield case("caps_chunks", number, row, row["cell"]["knobs"], work, None, 1_000 * row["prefill_s"])


def automatic():
    for number, row in enumerate(rows("auto_plans")):
        work = {name: row["cell"][name] for name in ("prompt_len", "max_new_tokens")}
        rate = row.get("prefill_tokens_s")
        prefill = rate and 1_000 * work["prompt_len"] / rate
        yield case("auto_plans", number, row, {**FUSED, **row["profile"]}, work, row["ms_per_token"], prefill)


def by_default():
    for number, row in enumerate(rows("default_plans")):
        call = row["call"].partition("batch_size=1, ")[2].rstrip(")")
        knobs = {name: eval(value) for name, value in (one.split("=") for one in call.split(", "))}
        # Steps are measured after 512 tokens, the prefill of all that were planned. Steps of superseded rows had other
        # kernels, and those after long prompts vary. Other processes ran beside some rows, which delays a prefill.
        work, planned = {"prompt_len": 512, "max_new_tokens": 144}, row["cell"].get("prompt_len", 2_048)
        if not row.get("superseded") and "prompt_len" not in row["cell"]:
            yield case("default_plans", number, row, knobs, work, row["ms_per_token"])
        if not row.get("beside_others"):
            prefill, prompt = 1_000 * planned / row["prefill_tokens_s"], {"prompt_len": planned, "max_new_tokens": 1}
            yield case("default_prefills", number, row, knobs, prompt, None, prefill)


def on_the_cpu():
    for number, row in enumerate(rows("cpu_times")):
        if row.get("superseded"):  # int8-wo by tiles
            continue
        # Its own rates, for other processes ran, so that they differ from row to row.
        rates = {name: row[name] for name in ("host_product_rate", "host_4bit_rate", "host_matmul_rate")}
        knobs = {name: value for name, value in row["cell"].items() if name not in ("model", "prompt_len")}
        other = {"machine": DEFAULT._replace(**rates), "on_cpu": True}
        work = {"prompt_len": 512, "max_new_tokens": 18}
        yield case("cpu_times", number, row, knobs, work, row["ms_per_token"], 1_000 * row["prefill_s"], **other)
    config = json.loads((Path(CHECKPOINT) / "config.json").read_text())
    demo = qv.Architecture.from_config(config)
    for number, row in enumerate(rows("backends_speed")):
        if row.get("superseded"):
            continue
        knobs = {name: row[name] for name in ("weights", "lm_head")}
        work = {"prompt_len": 512, "max_new_tokens": 144}
        yield case("backends_speed", number, row, knobs, work, row["ms_per_token"], architecture=demo, on_cpu=True)


CASES = [*decoding(), *streaming(), *small_cards(), *caches(), *chunks(), *automatic(), *by_default(), *on_the_cpu()]
DECODE = {one[0]: one for one in CASES if one[3] is not None}
PREFILL = {one[0]: one for one in CASES if one[4] is not None}

_CACHED = "the bundled model's matrices stay in the CPU's caches, and its stated times a weight are of larger ones"
# Rows that are more than 20 % from what is predicted: by how much in percent, and why.
DECODE_MISSES = {
    "decode 4": (37, "plain transformers in NF4: launched quicker than our fewer kernels in the same run (35.8 ms)"),
    "decode 8": (-24, "other runs were on the GPU"),
    "decode 9": (-30, "other runs were on the GPU"),
    "kv_formats 1": (-29, "int8 launches fewer kernels than int4, which took 29.3 ms on the same host"),
    "auto_plans 6": (-34, "int8-wo by 19 dequantized tiles a layer, before products of few rows had a kernel"),
    "backends_speed 2": (41, "it took less than with a whole head, which it only adds to"),
    "backends_speed 9": (62, _CACHED),
    "backends_speed 10": (101, _CACHED),
    "backends_speed 16": (22, _CACHED),
}
_PINNED = "the first generation, which also pins 3.8 GB of host memory for the cache"
_BUSY = "other processes ran on the two cores between the rate's measurement and the prefill's"
_STREAMING = "launched quicker than tiles of layers that stay, for a reason that is not known"
PREFILL_MISSES = {
    "streaming_caps 1": (-21, _PINNED),
    "streaming_caps 2": (-29, _PINNED),
    "auto_plans 5": (30, f"{_STREAMING}: the row before it, which streams nothing, took 45 ms more"),
    "default_prefills 8": (37, f"{_STREAMING}: 267 ms"),
    "default_prefills 9": (35, f"{_STREAMING}: 271 ms, a day before"),
    "default_prefills 10": (26, f"{_STREAMING}: 291 ms, with 16 streamed layers"),
    "cpu_times 0": (60, _BUSY),
    "cpu_times 1": (48, _BUSY),
    "cpu_times 2": (-36, _BUSY),
}


def error(label):
    _, what, on_cpu, decode, _ = DECODE[label]
    return decode_ms(*what, on_cpu=on_cpu) / decode - 1


def prefill_error(label):
    _, what, on_cpu, _, prefill = PREFILL[label]
    return first_token_ms(*what, on_cpu=on_cpu) / prefill - 1


def test_there_are_rows():
    assert (len(DECODE), len(PREFILL)) == (79, 38)


@pytest.mark.parametrize("label", [label for label in DECODE if label not in DECODE_MISSES])
def test_a_decode_step_is_predicted(label):
    assert abs(error(label)) <= 0.2


@pytest.mark.parametrize("label", [label for label in PREFILL if label not in PREFILL_MISSES])
def test_a_prefill_is_predicted(label):
    assert abs(prefill_error(label)) <= 0.2


@pytest.mark.parametrize("label", DECODE_MISSES)
def test_a_decode_step_that_is_not_is_named(label):
    percent, _ = DECODE_MISSES[label]
    assert abs(percent) > 20
    assert round(100 * error(label)) == percent


@pytest.mark.parametrize("label", PREFILL_MISSES)
def test_a_prefill_that_is_not_is_named(label):
    percent, _ = PREFILL_MISSES[label]
    assert abs(percent) > 20
    assert round(100 * prefill_error(label)) == percent


# What predictions depend on


SEVEN = find("Qwen2.5-7B-Instruct")
WORK = Workload(prompt_len=2048, max_new_tokens=256)


def profile(**knobs):
    return qv.Profile(**{**FUSED, **knobs})


def test_a_captured_step_does_not_wait_for_python():
    slow = DEFAULT._replace(layer_launch_time=10 * DEFAULT.layer_launch_time)
    captured = profile(weights="nf4", cache="static", captured=True)
    assert decode_ms(SEVEN, captured, WORK, slow) == decode_ms(SEVEN, captured, WORK, DEFAULT) < 6
    plain = profile(weights="nf4")
    assert decode_ms(SEVEN, plain, WORK, slow) == pytest.approx(10 * decode_ms(SEVEN, plain, WORK, DEFAULT))
    more = DEFAULT._replace(graph_node_time=2 * DEFAULT.graph_node_time)
    assert decode_ms(SEVEN, captured, WORK, more) > decode_ms(SEVEN, captured, WORK, DEFAULT)


@pytest.mark.parametrize(
    ("weights", "ms"), [("bf16", None), ("nf4", (2.78, 4.9)), ("int8-wo", (2.78, 8.8)), ("int4", None)]
)
def test_a_captured_step_takes_longer_with_more_rows(weights, ms):
    knobs = profile(weights=weights, captured=True)
    times = [decode_ms(SEVEN, knobs, replace(WORK, batch_size=rows), DEFAULT) for rows in range(1, 9)]
    assert times == sorted(times)
    if ms:  # 28 layers' products, and all else as of one row; nf4's of eight rows are in results/many_rows.jsonl
        assert (times[0], times[-1]) == (pytest.approx(ms[0], rel=0.05), pytest.approx(ms[1], rel=0.05))


@pytest.mark.torch
def test_times_are_of_as_many_rows_as_the_kernels_take():
    from qwen_vram.runtime.linear import few_rows

    assert (timing_few_rows.MOST_ROWS, few_rows._MOST_DENSE_ROWS) == (few_rows.MOST_ROWS, 1)
    captured = profile(captured=True)
    assert [timing_few_rows.by_few_rows(captured, "bf16", rows) for rows in (1, 2)] == [True, False]
    assert [timing_few_rows.by_few_rows(captured, "nf4", rows) for rows in (8, 64, 65)] == [True, True, False]
    assert [timing_few_rows.by_few_rows(captured, "int8-wo", rows) for rows in (8, 9)] == [True, False]


def test_a_table_on_the_host_is_waited_for_in_captured_steps_alone():
    one, other = (profile(weights="nf4", captured=True, embeddings=place) for place in ("device", "host"))
    assert decode_ms(SEVEN, other, WORK, DEFAULT) - decode_ms(SEVEN, one, WORK, DEFAULT) == pytest.approx(
        3.35 - 3.25, abs=0.02
    )
    one, other = (profile(weights="nf4", embeddings=place) for place in ("device", "host"))
    assert decode_ms(SEVEN, other, WORK, DEFAULT) == decode_ms(SEVEN, one, WORK, DEFAULT)


def test_eager_steps_in_8_bits_dequantize_only_for_more_than_eight_rows():
    eight, nine = (
        decode_ms(SEVEN, profile(weights="int8-wo"), replace(WORK, batch_size=rows), DEFAULT) for rows in (8, 9)
    )
    assert eight == decode_ms(SEVEN, profile(weights="fp8"), replace(WORK, batch_size=8), DEFAULT)  # Python's time
    assert nine > 1.2 * eight


def test_a_captured_step_grows_with_the_context():
    knobs = profile(cache="static", captured=True)
    short, long = (Workload(prompt_len=prompt, max_new_tokens=2) for prompt in (500, 32_000))
    grown = decode_ms(SEVEN, knobs, long, DEFAULT) - decode_ms(SEVEN, knobs, short, DEFAULT)
    assert grown == pytest.approx(28 * (0.0294 - 0.0058), rel=0.1)  # a layer's attention, measured on an H200


def test_a_prompt_takes_longer_in_more_chunks():
    times = [first_token_ms(SEVEN, profile(prefill_chunk_size=size), WORK, DEFAULT) for size in (2048, 512, 64)]
    assert times == sorted(times)
    assert times[-1] > 10 * times[0]


def test_a_cpu_is_predicted_by_its_own_rates():
    small = find("Qwen2.5-0.5B-Instruct")
    what = (small, profile(), Workload())
    assert 50 < decode_ms(*what, DEFAULT, on_cpu=True) < 200
    quick = DEFAULT._replace(source="measured", host_product_rate=100_000_000_000, host="A CPU, 32 cores")
    assert decode_ms(*what, quick, on_cpu=True) < 25
    times = predict_times(*what, quick, on_cpu=True)
    assert (times.machine, times.measured) == ("A CPU, 32 cores", True)
    assert predict_times(*what, quick._replace(host=""), on_cpu=True).machine == "the CPU beside NVIDIA H200"


def test_a_cpu_that_has_no_kernel_for_4_bits_is_slower_with_them():
    small = find("Qwen2.5-0.5B-Instruct")
    measured = DEFAULT._replace(host_product_rate=11_800_000_000)
    kernel = measured._replace(host_4bit_rate=19_500_000_000)
    what = (small, profile(weights="nf4"), Workload())
    assert decode_ms(*what, measured, on_cpu=True) > 3 * decode_ms(*what, kernel, on_cpu=True)


def test_a_generation_is_its_first_token_and_the_others():
    what = (SEVEN, profile(weights="int4"), WORK, DEFAULT)
    assert generation_ms(*what) == pytest.approx(first_token_ms(*what) + 255 * decode_ms(*what))
    assert generation_ms(*what, on_cpu=True) > generation_ms(*what)


@pytest.mark.parametrize("weights", [name for name in FORMAT_NAMES if FORMATS[name].parts])
def test_every_format_has_a_time(weights):
    on_gpu, on_cpu = (
        generation_ms(SEVEN, profile(weights=weights), WORK, DEFAULT, on_cpu=one) for one in (False, True)
    )
    assert 1_000 < on_gpu < 20_000
    assert 5 * on_gpu < on_cpu < 5_000_000


def test_a_search_can_ask_a_thousand_times():
    profiles = [profile(weights="nf4", streamed_layers=count, prefill_chunk_size=512) for count in range(29)]
    best = float("inf")
    for _ in range(10):  # the quickest; CPU time, for other processes run
        began = time.process_time()
        for one in profiles:
            generation_ms(SEVEN, one, WORK, DEFAULT)
        best = min(best, (time.process_time() - began) / len(profiles))
    assert best < 200e-6


# Where they are shown


def test_a_plan_says_what_it_predicts_and_for_which_machine():
    plan = qv.plan("Qwen2.5-7B-Instruct", vram="24GiB", ram="64GiB", prompt_len=2048, max_new_tokens=256)
    line = "predicted: 4.0 ms a token, first token after 0.05 s, on NVIDIA H200 (stated rates)"
    assert f"\n  {line}\n" in str(plan)
    assert line in plan._repr_html_()
    times = json.loads(json.dumps(plan.to_dict()))["times"]
    assert times == plan.times.to_dict()
    assert (times["machine"], times["measured"]) == ("NVIDIA H200", False)
    assert qv.Plan.from_dict(plan.to_dict()).times == plan.times


def test_a_plan_for_the_cpu_names_a_cpu():
    plan = qv.plan("Qwen2.5-0.5B-Instruct", vram={}, ram="8GiB")
    assert plan.times.machine == "AMD EPYC, 2 cores"
    assert 50 < plan.steps[-1].decode_floor_ms < plan.times.ms_per_token < 200


def test_the_command_line_says_it_too():
    result = CliRunner().invoke(app, ["plan", "Qwen2.5-0.5B-Instruct", "--vram", "4GiB", "--ram", "8GiB"])
    assert result.exit_code == 0
    assert "on NVIDIA H200 (stated rates)\n" in result.stdout


@pytest.mark.torch
def test_a_report_has_them_beside_what_was_measured():
    with qv.load(CHECKPOINT, device="cpu", weights="bf16", prompt_len=64, max_new_tokens=32, progress=False) as llm:
        assert llm.report().times is None
        assert "times" not in llm.report().to_dict()
        began = time.perf_counter()
        report = llm.probe(prompt_len=40, max_new_tokens=20)
        whole = 1_000 * (time.perf_counter() - began)
        measured = report.times.measured
        assert (measured.workload.prompt_len, measured.workload.max_new_tokens) == (40, 20)
        assert 0 < measured.first_token_ms + 19 * measured.ms_per_token <= whole
        figures = report.to_dict()["times"]
        assert figures["ms_per_token"] == {
            "predicted": report.times.predicted.ms_per_token,
            "measured": measured.ms_per_token,
        }
        assert (figures["machine"], figures["rates"]) == ("AMD EPYC, 2 cores", "stated")
        assert "\nms a token " in str(report)
        assert "\nfirst token, ms " in str(report)
        one = llm.probe(max_new_tokens=1)
        assert one.times.measured.ms_per_token is None
        assert "\nms a token " not in str(one)


@pytest.mark.gpu
@pytest.mark.torch
def test_on_a_gpu_the_clock_is_the_devices():
    knobs = {"weights": "bf16", "prompt_len": 64, "max_new_tokens": 64, "progress": False}
    with qv.load(CHECKPOINT, **knobs) as llm:
        llm.probe()
        began = time.perf_counter()
        measured = llm.probe().times.measured
        whole = 1_000 * (time.perf_counter() - began)
        assert 0.5 * whole < measured.first_token_ms + 63 * measured.ms_per_token <= whole
