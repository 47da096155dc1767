"""Memory and time of a model as arithmetic: integers of bytes and predicted times.

The modules open no file and do not import torch.
"""
