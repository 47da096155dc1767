"""Quantized checkpoints written from a loaded model.

Modules:
    save    `LoadedModel.save_quantized()`: write the weights as a quantized checkpoint.
    writer  Writer of tensors into safetensors files, in place and from any thread.
"""
