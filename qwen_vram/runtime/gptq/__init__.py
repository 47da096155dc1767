"""Quantization of 16-bit checkpoints by GPTQModel in a separate process.

Modules:
    job           The job of a GPTQ quantization: checked first, then run in a separate process.
    process       The separate process of GPTQModel: its environment, progress and log.
    quantize      `quantize_gptq()`: quantize a 16-bit checkpoint to the GPTQ format.
    sample_texts  Sample texts for calibration, from a list or a file, and as tokens.
    worker        The worker process of `quantize_gptq()`, with GPTQModel's settings and patches.
"""
