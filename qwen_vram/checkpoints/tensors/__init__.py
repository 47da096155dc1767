"""Checks of a checkpoint's tensors against the model that config.json describes.

Modules:
    advice               Errors for tensors that do not match config.json, with the step that helps.
    check                Check of every 16-bit tensor against config.json, before anything is allocated.
    names                Names of a checkpoint's tensors, mapped to the model's as by `transformers`.
    prequantized         Check of a prequantized checkpoint's tensors: name, dtype and shape.
    prequantized_advice  Error texts for prequantized checkpoints, with the step that helps.
    prequantized_matrix  Tensors of a quantized matrix in the format of each library.
    quantized_names      Recognition of a checkpoint's quantizer by the names and dtypes of its tensors.
    wrapped_names        Recognition of tensor names from a model that was saved inside a wrapper.
"""
