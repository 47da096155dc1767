"""Checks of a checkpoint's tensors against the model that config.json describes."""
