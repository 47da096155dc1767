"""Predicted times of prefill and decode steps.

They are bytes, operations and launches over the rates of a machine.
"""
