"""Attention kernels without masks, for prefill, long contexts and decode steps.

Modules:
    decode          Attention of one new token per sequence, over a cache with lengths on the device.
    decode_kernels  Triton kernels of attention of one new token, with its rotation and its cache write.
    decode_step     Attention of captured decode steps, if the kernels of `decode_kernels` apply to a model.
    fused           `attention="fused"`: torch's flash kernel with grouped heads and no mask.
    split_kv        Attention of a chunk over a long past, in parts joined by their log-sum-exps.
"""
