"""Plain `transformers`: measurement of `from_pretrained` and `generate`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen_vram.arithmetic.timing.generation import times_of
from qwen_vram.benchmark.case import Case, measured_memory, measured_times, predicted
from qwen_vram.benchmark.token_times import EnergyMeter, TokenTimes
from qwen_vram.checkpoints.resolve import resolve
from qwen_vram.estimator import estimate_vram
from qwen_vram.planning.capacity.hardware import with_this_cpu
from qwen_vram.planning.capacity.nvml import driver
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.kv_cache.preallocated import cache_bytes
from qwen_vram.runtime.measure import PeakMeter, weight_storages
from qwen_vram.runtime.tensors.checkpoint import open_checkpoint
from qwen_vram.spec.formats import FORMATS


def measure_plain(case: Case) -> dict[str, Any]:
    """Run a case with plain `transformers`, and return the fields of its row."""
    weights = case.arguments["weights"]
    estimate = estimate_vram(case.model, weights=weights, **case.workload)
    folder = open_checkpoint(case.model, resolve(case.model)).folder
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0 if case.device == "cuda" else "cpu"}}
    said = "dtype=torch.bfloat16"
    if not FORMATS[weights].is_dense:
        from qwen_vram.runtime.backends.bnb import quantization_config

        options["quantization_config"] = quantization_config(weights, head=False, dtype=torch.bfloat16)
        said += ", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        said += "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    loading = time.perf_counter() - began
    device = torch.device(case.device, 0) if case.device == "cuda" else torch.device("cpu")
    held = sum(weight_storages(model, get_backend(weights), device).values())
    ids = torch.randint(0, model.config.vocab_size, (case.batch_size, case.prompt_len)).to(device)
    # Options of the checkpoint's generation_config.json would change the memory: beams, or a static cache.
    settings = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True}

    def generate(new: int, streamer: TokenTimes) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, streamer=streamer, **settings
        )

    meter = PeakMeter(device)
    meter.start()
    with driver() as pynvml:
        energy = EnergyMeter(pynvml, device)
        cold = TokenTimes(on_first=energy.start)
        output = generate(case.max_new_tokens, cold)
        tokens_per_joule = energy.tokens_per_joule(case.batch_size * (case.max_new_tokens - 1))
    found = {"weights": held, "kv_cache": cache_bytes(output.past_key_values, device), **meter.stop()}
    memory = measured_memory(found, device)
    del output
    warm = TokenTimes()
    generate(1, warm)
    on_cpu = case.device == "cpu"
    times = times_of(replace(estimate, machine=with_this_cpu(estimate.machine, on_cpu=on_cpu)), on_cpu=on_cpu)
    return {
        "call": f"AutoModelForCausalLM.from_pretrained({case.model!r}, {said}, device_map={options['device_map']})",
        "predicted": predicted(estimate, times, on_cpu=on_cpu),
        "measured": {**memory, **measured_times(cold, warm), "tokens_per_joule": tokens_per_joule}
        | {"load_seconds": loading},
        "rates": times.place,
    }
