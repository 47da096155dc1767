"""Checkpoints on the hub, and its errors in this library's words."""
