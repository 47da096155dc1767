"""Attention kernels: grouped heads without a mask, long pasts in parts, and one token of every sequence."""
