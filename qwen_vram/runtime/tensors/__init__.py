"""A checkpoint's tensors for torch: opened, mapped and packed."""
