"""Reading of checkpoints, adapters and machine files, from folders and the hub.

All that opens files or asks the hub is here. The modules do not import torch.
"""
