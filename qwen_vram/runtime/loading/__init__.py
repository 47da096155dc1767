"""`load()`: preflight checks, devices, and the model built as planned."""
