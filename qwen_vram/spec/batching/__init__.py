"""Batched requests: the pages of their KV cache, and the knobs of their plans.

Modules:
    concurrency  `concurrency=N`: the knobs and the batch of a plan whose requests run together.
    pages        Pages of a paged KV cache, which the requests of a batch share.
"""
