"""Quantization of 16-bit checkpoints by GPTQModel in a separate process."""
