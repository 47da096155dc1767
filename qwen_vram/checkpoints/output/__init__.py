"""Output of a new checkpoint: its layout, and a folder that appears only when complete."""
