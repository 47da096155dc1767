"""Descriptions of models, workloads and knobs.

The modules open no file and do not import torch.
"""
