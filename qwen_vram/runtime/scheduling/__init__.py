"""Turns of callers: a fair queue, threads that compute, stopping, and clocks."""
