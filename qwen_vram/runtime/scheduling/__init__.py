"""Turns of callers: a fair queue, threads that compute, stopping, and clocks.

Modules:
    clock     Times of a generation by the device's clock, so that nothing waits for it.
    job       Jobs: each generation waits for its turn in its own thread, and runs in a runner.
    runner    Runners: threads in which generations compute, reused by later ones.
    stopping  The stopping criterion of a generation whose turn was stopped.
    turns     Turns: one generation of a model at a time, first come, first served.
"""
