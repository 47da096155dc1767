"""Load the bundled model, chat with it, and compare measured memory with the prediction. Runs offline on a CPU."""

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT

with qv.load(CHECKPOINT, profile="int4-flash", progress=False) as llm:
    print(llm.chat("What is 12 + 30?"))
    for piece in llm.stream("Write a Python function add_three(x) that returns x plus 3."):
        print(piece, end="", flush=True)
    print(f"\n\n{llm.report()}")
