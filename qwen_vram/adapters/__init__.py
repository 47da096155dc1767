"""The one reader of LoRA adapters: folder, settings, tensor headers, and what they change in a base. No torch."""
