"""vLLM as the engine of a server: a process of its own, behind the same address, keys and limits."""
