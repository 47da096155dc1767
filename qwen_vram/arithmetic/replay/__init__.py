"""Simulation of torch's caching allocator over the allocations of a load and a generation.

Modules:
    allocator          Simulation of torch's caching allocator, which computes reserved memory.
    attention          Allocations of attention and its KV cache in their order, for the replay.
    generation         Events of a generation, tensor by tensor, in the order of `transformers`.
    linear             Allocations of norms and matrix products in their order, for the replay.
    live_bytes         Live bytes beside the weights at each moment of a step, summed from the trace.
    load               Allocations of loading a 16-bit checkpoint in their order, for the replay.
    load_prequantized  Allocations of loading a prequantized checkpoint in their order, for the replay.
    trace              The trace of a run: allocations and frees as events, in the order of the real run.
"""
