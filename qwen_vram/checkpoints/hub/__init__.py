"""Checkpoints on the hub, and errors of the hub as errors of this library."""
