"""A checkpoint's tensors for torch: opened, mapped and packed.

Modules:
    checkpoint          The checked checkpoint that a model is loaded from, with config and tokenizer.
    file_extents        Byte ranges of a block in the checkpoint's files, and reading them.
    gc_scope            Control of Python's garbage collector while a model loads.
    mapped_checkpoint   Stored tensors of a checkpoint, mapped from its files, with their byte ranges.
    packed_layout       Layout of a block of weights in one piece of memory, for one copy.
    partial_checkpoint  `from_pretrained` with more or fewer tensors than the checkpoint holds.
"""
