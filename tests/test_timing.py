"""Predicted times against every row with a time of a decode step or a prefill in benchmarks/results."""

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.catalog import find
from qwen_vram.arithmetic.machine import DEFAULT
from qwen_vram.arithmetic.timing_decode import decode_ms
from qwen_vram.arithmetic.timing_generation import generation_ms, predict_times
from qwen_vram.arithmetic.timing_prefill import first_token_ms
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.demo import CHECKPOINT

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FUSED = {"attention": "fused", "kernels": "fused", "cache": "preallocated"}
# Rates that were measured on the H100 before its runs; whatever else it has is the stated default, as of the H200.
H100 = replace(
    DEFAULT,
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


def on_the_cpu():
    for number, row in enumerate(rows("cpu_times")):
        # Its own rates, for other processes ran, so that they differ from row to row.
        rates = {name: row[name] for name in ("host_product_rate", "host_4bit_rate", "host_matmul_rate")}
        knobs = {name: value for name, value in row["cell"].items() if name not in ("model", "prompt_len")}
        other = {"machine": replace(DEFAULT, **rates), "on_cpu": True}
        work = {"prompt_len": 512, "max_new_tokens": 18}
        yield case("cpu_times", number, row, knobs, work, row["ms_per_token"], 1_000 * row["prefill_s"], **other)
    config = json.loads((Path(CHECKPOINT) / "config.json").read_text())
    demo = qv.Architecture.from_config(config)
    for number, row in enumerate(rows("backends_speed")):
        knobs = {name: row[name] for name in ("weights", "lm_head")}
        work = {"prompt_len": 512, "max_new_tokens": 144}
        yield case("backends_speed", number, row, knobs, work, row["ms_per_token"], architecture=demo, on_cpu=True)


CASES = [
    *decoding(), *streaming(), *small_cards(), *caches(), *chunks(), *automatic(), *on_the_cpu()
]  # fmt: skip
DECODE = [one for one in CASES if one[3] is not None]
PREFILL = [one for one in CASES if one[4] is not None]
if __name__ == "__main__":
    for cases, at, predict in ((DECODE, 3, decode_ms), (PREFILL, 4, first_token_ms)):
        for one in cases:
            got=predict(*one[1], on_cpu=one[2]); r=got/one[at]-1
            print(f"{one[0]:20} {'PREFILL' if at==4 else 'decode'} {got:9.2f} {one[at]:9.2f} {r:+.1%} {'***' if abs(r)>.2 else ''}")
