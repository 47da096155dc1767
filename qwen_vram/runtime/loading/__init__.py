"""`load()`: preflight checks, devices, and the model built as planned.

Modules:
    device_map  The device map for `transformers`, and hooks between GPUs only.
    devices     The devices that a model is loaded on, and the check of their free memory.
    load        `load()`: plan, check, and build exactly what was planned.
    preflight   Checks of libraries, kernels and devices before anything is allocated.
    verify      Check of a loaded model against its plan, by one prefill and one decode step.
"""
