"""Which profile fits a budget, and where each layer lies. Arithmetic, and what the driver says is free; no torch."""
