"""Decoder layers and token embeddings that stay on the host or the disk."""
