"""GPTQModel in a process of its own: 16-bit checkpoints to GPTQ codes."""
