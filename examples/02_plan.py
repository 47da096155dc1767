"""Find the least lossy plan for several GPU sizes, and show the error if no plan fits."""

import qwen_vram as qv

MODEL = "Qwen/Qwen2.5-7B-Instruct"

for vram in ("24GiB", "12GiB", "8GiB"):
    print(qv.plan(MODEL, vram=vram, ram="32GiB", prompt_len=16_000), end="\n\n")

try:
    qv.plan(MODEL, vram="8GiB", ram="32GiB", prompt_len=16_000, batch_size=8)
except qv.DoesNotFitError as error:
    print(error)
    print("nearest workload:", error.nearest)
