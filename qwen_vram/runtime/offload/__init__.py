"""Decoder layers and tables that stay on the host or the disk."""
