"""Requests that run together over pages of the KV cache.

Modules:
    batch_job   One caller's call in a batch: a `Job` of one or several requests.
    batch_step  Decode step of a batch: one token of each request, captured for some batch sizes.
    batched     Generations of a plan with pages: sequences of all calls run together.
    batcher     The batcher: runs requests together, from waiting to their last token.
    choice      Choice of the next tokens of a batch, by the settings of each request.
    request     One request of a batch: its settings in `transformers`' terms, and its tokens.
"""
