"""A new checkpoint: its layout, and its folder, which appears whole or not at all."""
