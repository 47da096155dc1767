"""Descriptions of models, workloads and knobs.

The modules open no file and do not import torch.

Modules:
    architecture  The shape of a decoder, and the list of every weight.
    batching/     Batched requests: the pages of their KV cache, and the knobs of their plans.
    cards/        Cards to plan for: their figures, and the rates that times are computed with.
    catalog       The catalog: published dense Qwen2.5 and Qwen3 checkpoints, found by name.
    catalog_rows  Rows of the catalog: checkpoints with the numbers of their config.json.
    config/       Values of a config.json, with the defaults and the types of `transformers`.
    families/     Families of decoders: one module for each `model_type` of config.json.
    family        Description of a family: the common properties of one `model_type`'s models.
    formats       Storage formats: the bytes of a weight as sums that are checked by eye.
    kv_formats    Table of KV cache formats: the bytes of keys and values.
    layers        Description of a decoder layer: its weights, its attention, and its sizes.
    machine       A machine: memory of GPU and driver, and rates; defaults until they are measured.
    prequantized  Bytes of a prequantized checkpoint's tensors, by part.
    profile       The profile: a frozen object of all knobs, shared by estimator and loader.
    quantization  `quantization_config` of config.json: method, format, and modules left out.
    quantizers    Libraries that quantize checkpoints, by `quant_method`, with what loads them.
    residency     Location of each decoder layer, the embeddings and the head, by a profile.
    rope          Rotary positions of config.json (`transformers` 4 and 5), and how to extend them.
    rules/        Rules for knobs: combinations that are refused.
    workload      The workload: the number of sequences and the lengths of one generation.
"""
