"""Fused element-by-element operations of decoder layers, and their Triton kernels.

Modules:
    fused_layers    `kernels="fused"`: decoder layers with fused norms, rotary embedding and SwiGLU.
    fused_ops       Element-by-element operations of a layer, as one kernel each if Triton runs.
    triton_kernels  Triton kernels of the operations in `fused_ops`.
"""
