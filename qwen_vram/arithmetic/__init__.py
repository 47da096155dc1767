"""Memory and time of a model as arithmetic: integers of bytes and predicted times.

The modules open no file and do not import torch.

Modules:
    attention        Lengths and alignments that attention kernels require, for estimator and runtime.
    batching         Memory of batched requests: tensors of their decode steps and prompts.
    continued        Prefill after a filled cache: the largest piece of tokens that a plan covers.
    decode_graph     Memory of captured decode steps beside the KV cache.
    device_estimate  The estimate of one device, from weights, KV cache, activations and process memory.
    estimate         The estimate: predicted peak memory of a model, part by part.
    gpu_split        The estimate of a model that is sharded over several GPUs.
    int8_outliers    Memory of the outlier columns in products with int8 matrices.
    kv_cache         Bytes of the KV cache, by format, kind and device.
    pipeline         Division of decoder layers into consecutive parts, one for each device.
    process          Process memory beside torch's tensors: CUDA context, kernels and libraries.
    render           Rendering of an estimate as text, HTML and a picture.
    replay/          Simulation of torch's caching allocator over the allocations of a load and a generation.
    session          Memory of a session: generations within the planned lengths, in any order.
    tensor_parallel  Division of every layer over several GPUs, as tensor parallelism divides it.
    tiling           Tiles: the rows of a matrix that are quantized or dequantized at once.
    timing/          Predicted times of prefill and decode steps.
    weights          Bytes of the weights in their storage formats, and of their part on the device.
"""
