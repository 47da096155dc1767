"""Predicted times of prefill and decode steps, from bytes, operations and launches over the rates of a machine."""
