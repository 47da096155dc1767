"""Generations by a plan: cache, options that change memory, and streamed answers.

Modules:
    answer_stream      Streams of answers, which are read while they are generated.
    asked              Options of `generate` that change the planned memory, or that no estimate counts.
    caches             KV caches of a plan: the cache that `new_cache()` returns, and that of one generation.
    continued_prefill  Prefill in chunks after a filled cache.
    finite             Detection of logits that are not finite, and search for the module that made them.
    generations        Generations by a plan, one at a time: cache, limits and measured memory.
    job_stream         Streams of a job: pieces that a generation makes, read from a queue while it runs.
    kept_cache         The one cache that a model keeps between the turns of a conversation.
    limits             Limits of a generation: the plan's lengths, and its budget for everything else.
    token_stream       Streams of tokens with log probabilities, of requests that were checked before.
    watched            Context of each call of `model.generate`: finite logits, a seed, and clear errors.
"""
