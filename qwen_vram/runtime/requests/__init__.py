"""Requests: messages, chat templates, options and sampling settings, checked.

Modules:
    conversation  Conversations: messages through the chat template to tokens.
    options       Options of `chat`, `generate` and `stream`, sorted by their receiver.
    prompts       Prompts: a checked request, as tokens and options for `generate`.
    sampling      Settings of one generation: options over generation_config.json, checked.
    seeded        Sampling from a seed, which borrows torch's generator for each draw.
    template      The chat template of a tokenizer: its choice, its variables, and its end token.
    vocabulary    Checks of a tokenizer against the embedding matrix of its model, and padding.
"""
