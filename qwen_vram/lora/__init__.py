"""Merge of LoRA adapters into their base, with quantization in the same pass.

One piece of a tensor at a time is merged in float32 and quantized.

Modules:
    codecs/       Storage formats of merged weights, encoded some rows at a time.
    delta         The update of one tensor by an adapter, computed in float32, some rows at a time.
    fidelity      The share of an update that survives rounding or quantization.
    gptq          A merge in GPTQ's format, and its comparison with the merge in float32.
    merge         `merge_lora_then_quantize()`: merge adapters, quantize, and write a checkpoint.
    output_files  Files beside the merged weights: config.json, tokenizer and generation settings.
    pipeline      The merge pipeline: threads read, merge, store and check pieces of rows.
    plan          The plan of a merge: tensors, formats, shards and files, checked before writing.
    report        The report of a merge: the share kept of the update in each module.
    slots         Stored tensors of a merged weight, in the base's dtype or a codec's format.
    targets       The tensors of the merged checkpoint: their source, updates, ties and sizes.
    tensor_file   Tensors on disk, read piece by piece with bounded memory.
    updates       Updates with readable tensors, from the changes that an adapter's headers show.
    weighted      The adapters of a merge, each with its weight in the sum.
"""
