"""Fused element-by-element operations of decoder layers, and their Triton kernels."""
