"""Decode steps that are captured as CUDA graphs, and generation that replays them.

Modules:
    capture_stream  CUDA streams on which decode steps are captured.
    generate_loop   The generation loop of `transformers` over captured decode steps.
    graph_cache     Static KV buffers for captured decode steps, and the cache that borrows them.
    graph_decoder   The decoder: compiles and captures decode steps, and keeps their KV buffers.
    graph_step      The decode step: one token of every sequence, captured as CUDA graphs.
    layer           One new token per sequence through a decoder layer and the head, for capture.
    token_sampler   Sampling after a decode step, with a deferred check of the end.
"""
