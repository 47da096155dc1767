"""The engine: a bounded queue of requests, and a thread that runs them on a loaded model.

Modules:
    answer       One answer while it is generated: from tokens to events.
    answer_text  The text of an answer, token by token: whole characters, and the end before a stop text.
    engine       The engine: it loads the model, and runs the requests that the plan allows at once.
    interface    The interface of an engine, which is all that the web server uses of it.
    preparation  Preparation of a request: its answers as streams that are checked and have not started.
    token_bytes  Texts and bytes of single tokens, for log probabilities.
    tool_calls   Calls of tools in an answer, as Qwen's chat templates ask for them.
    work_queue   The queue of requests: bounded, in order of arrival, with cancellation.
"""
