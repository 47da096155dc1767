"""The one reader of LoRA adapters: folder, settings, headers, and what they change in a base."""
