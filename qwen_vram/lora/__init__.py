"""Merge of LoRA adapters into their base, with quantization in the same pass.

One piece of a tensor at a time is merged in float32 and quantized.
"""
