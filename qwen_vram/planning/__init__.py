"""FLOOR 2: what to do about it. Arithmetic, and what the driver says is free; no torch."""
