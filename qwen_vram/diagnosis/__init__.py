"""Diagnosis of models and machines: findings with costs in bytes or time, and fixes.

Modules:
    checks/        Checks: functions from a model on a machine to findings.
    copies         Measured rates of copies from host memory to the GPU, pinned and not.
    costs          Costs of a setting for one model and workload, by this library's arithmetic.
    doctor         `doctor()`: find what costs memory or time, in a model and on this machine.
    finding        A finding: one cause of lost memory or time, with its cost and its fix.
    live_model     Facts of a live model, which `transformers` or this library loaded.
    live_tensors   Tensors of a live model: its matrices with their formats, and the bytes of its storages.
    machine_facts  Facts of a machine that checks read: GPUs, links, host memory, libraries and settings.
    model_facts    Facts of a model that checks read: its matrices, settings, and places of its weights.
    offload_hooks  Weights that accelerate's hooks keep off the device, and the time of these hooks.
    redaction      Removal of names, paths and tokens from a text that is to be published.
    report         `Diagnosis`: findings and facts, as text, as JSON, and as a report to publish.
    stored_model   Facts of a checkpoint as a plain `from_pretrained` would load it here, without torch.
"""
