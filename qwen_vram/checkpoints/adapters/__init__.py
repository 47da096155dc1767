"""Reading of LoRA adapters: folder, settings, tensors, and changes to the base."""
