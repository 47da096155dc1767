"""A plan as the arguments of `vllm serve`, by arithmetic alone: vLLM is never imported.

Modules:
    arguments  The arguments of `vllm serve` for a plan, as data and as a command.
    formats    Formats of weights and caches in vLLM, for those of a plan, with their costs in bytes.
    memory     Bytes of a vLLM worker, term by term: what of its budget is left for keys and values.
    refusals   Savers of a plan that vLLM does not have: refused, or named in a note.
    workers    Division of a model over vLLM's workers, and the bytes of weights on the fullest one.
"""
