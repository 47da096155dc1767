"""Descriptions of models, workloads and knobs, without the bytes of a run. Opens no file, imports no torch."""
