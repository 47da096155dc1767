"""vLLM as the engine of a server: a process of its own behind the same gates.

Modules:
    child        The process of vLLM, in a group of its own: start, output and end.
    environment  The environment of vLLM: found, or made with pip in a folder of its own.
    metrics      Metrics of a server in front of vLLM: its own, the plan's, and those of vLLM.
    passing      Requests that are passed through to vLLM, whole or as a stream.
    server       Server that starts vLLM, passes requests through to it, and ends it.
    startup_log  Reader of vLLM's start-up log: the bytes and tokens that it states.
    state        State of a server in front of vLLM, and the figures that vLLM has stated.
"""
