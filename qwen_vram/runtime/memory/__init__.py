"""Memory beside the model: workspaces, reserved segments, and memory given back.

Modules:
    beside      Torch's memory on a model's devices that belongs to others.
    release     Return of memory that libraries and errors keep, to the system and the driver.
    segments    Limits on torch's reserved memory, within a plan and over a session.
    workspaces  cuBLAS workspaces, one for each thread and stream, which stay allocated.
"""
