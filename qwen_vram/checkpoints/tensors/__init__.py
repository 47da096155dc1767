"""The tensors of a checkpoint, each held against the model that config.json describes."""
