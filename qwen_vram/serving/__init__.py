"""The server `qwen-vram serve`, which speaks the protocol of OpenAI over one loaded model.

Modules:
    concurrency  Number of requests that a server runs at once, chosen by plans.
    engine/      The engine: a bounded queue of requests, and a thread that runs them on a loaded model.
    vllm/        vLLM as the engine of a server: a process of its own behind the same gates.
    web/         The web server: routes, streams, access control, limits, metrics and lifecycle.
    wire/        The wire format: requests as checked data, and answers and errors as JSON objects.
"""
