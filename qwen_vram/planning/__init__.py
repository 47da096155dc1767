"""Choice of a profile that fits a budget, with a location for each layer.

It is arithmetic over the free memory that the driver reports. The modules do not import torch.
"""
