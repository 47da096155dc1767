"""Attention kernels without masks, for prefill, long contexts and decode steps."""
