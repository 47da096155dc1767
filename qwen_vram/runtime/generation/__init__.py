"""Generations by a plan: cache, options that change memory, and streamed answers.

Modules:
    answer_stream  Streams of answers, which are read while they are generated.
    asked          Options of `generate` that change the planned memory, or that no estimate counts.
    finite         Detection of logits that are not finite, and search for the module that made them.
    generations    Generations by a plan, one at a time: cache, limits and measured memory.
    watched        Context of each call of `model.generate`: finite logits, a seed, and clear errors.
"""
