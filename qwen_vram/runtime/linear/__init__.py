"""Linear layers by storage format, and products of few rows.

Modules:
    cpu_4bit           Products of bitsandbytes' 4-bit matrices by its fused kernel on the CPU.
    few_rows           Products of one to eight rows, if a kernel of `few_rows_kernels` applies.
    few_rows_kernels   Triton kernels for products of one to eight rows, which read each matrix once.
    flat_4bit          Products on the CPU of 4-bit matrices whose shapes bitsandbytes' kernels refuse.
    int4               int4 linear layers on torch's tinygemm kernels.
    int4_kernels       Triton kernels for products of one to eight rows with int4 codes.
    int4_levels        Choice of scales and zeros for int4, with a small squared error.
    int4_packing       Packing and unpacking of int4 codes in the orders of torch's kernels.
    int8_fp8           int8-wo and fp8 linear layers: one byte per weight, and one scale per row.
    many_rows          Products of up to 64 rows with matrices in 4 bits, if `many_rows_kernels` applies.
    many_rows_kernels  Triton kernel for products of up to 64 rows with matrices in 4 bits, on tensor cores.
    step_products      Products of a decode step's rows, by the fastest kernel that applies.
    tiled              A product with a matrix that is dequantized one tile after the other.
    tiled_4bit         bitsandbytes' 4-bit linear layers, dequantized by tiles for many rows.
    tiled_int8         bitsandbytes' int8 linear layers with memory that does not depend on the data.
    weight_only        The base class of linear layers with codes on torch's own operators.
"""
