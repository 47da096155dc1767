"""A checkpoint's tensors for torch: opened, mapped, packed, and quantized as they arrive."""
