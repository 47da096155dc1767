"""Predict the memory of Qwen2.5-7B-Instruct, and the effect of each knob. Nothing is loaded."""

import qwen_vram as qv

MODEL = "Qwen/Qwen2.5-7B-Instruct"

print(qv.estimate_vram(MODEL, prompt_len=8_000))
print()
for name, knobs in {
    "bf16": {},
    "nf4": {"weights": "nf4"},
    "nf4, fused attention, chunks of 1,024": {
        "weights": "nf4",
        "attention": "fused",
        "cache": "preallocated",
        "prefill_chunk_size": 1024,
    },
    "the same, embeddings on the host": {
        "weights": "nf4",
        "attention": "fused",
        "cache": "preallocated",
        "prefill_chunk_size": 1024,
        "embeddings": "host",
    },
}.items():
    estimate = qv.estimate_vram(MODEL, prompt_len=8_000, **knobs)
    print(f"{name:40} {estimate.process_total / 2**30:6.2f} GiB by nvidia-smi")
