"""Predicted times of prefill and decode steps.

They are bytes, operations and launches, divided by the rates of a machine.

Modules:
    attention     Times of attention and of element-by-element kernels on a GPU.
    batched_step  Times of an engine's steps that mix decoding sequences with chunks of prompts.
    bytes_moved   Lower bound of milliseconds per token: the bytes that must move, over their rate.
    decode        Predicted milliseconds of a decode step in the middle of the answer.
    few_rows      Times of products of few rows by this library's kernels.
    generation    Times of a generation: to the first token, per later token, and in total.
    host          Times of steps on the CPU: bytes over the rate of products, and Python's own time.
    launches      Times of launching kernels from Python, one by one or as a CUDA graph.
    linear        Times of matrix products on a GPU, by format and number of rows.
    prefill       Predicted milliseconds from the prompt to the first token.
"""
