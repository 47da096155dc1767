"""Quantized checkpoints written from a loaded model."""
