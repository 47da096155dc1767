"""Loading and running of a model as its plan says.

It is the first floor that imports torch.

Modules:
    attention/        Attention kernels without masks, for prefill, long contexts and decode steps.
    backends/         Backends by storage format, imported when a format is first used.
    batching/         Requests that run together over pages of the KV cache.
    conversations     Conversations that keep their KV cache, so that a turn feeds only new tokens.
    decoding/         Decode steps that are captured as CUDA graphs, and generation that replays them.
    generation/       Generations by a plan: cache, options that change memory, and streamed answers.
    gptq/             Quantization of 16-bit checkpoints by GPTQModel in a separate process.
    kernels/          Fused element-by-element operations of decoder layers, and their Triton kernels.
    kv_cache/         KV caches: preallocated, quantized, and in host memory.
    linear/           Linear layers by storage format, and products of few rows.
    loaded_model      `LoadedModel`: a model with tokenizer and plan, which generates and reports its memory.
    loading/          `load()`: preflight checks, devices, and the model built as planned.
    measure           Measured memory of a loaded model, part by part, compared with the prediction.
    memory/           Memory beside the model: workspaces, reserved segments, and memory given back.
    offload/          Decoder layers and token embeddings that stay on the host or the disk.
    peft_adapter      A LoRA adapter beside its base, run by PEFT in the model's own dtype.
    progress          Progress bars on standard error: ours over bytes, and those of `transformers`.
    publication       Facts of a loaded model that a monitor reads: plan, GPUs and measured bytes.
    quantize_on_load  Quantization of each matrix while `transformers` loads the checkpoint.
    report_times      Predicted and measured times of a generation, for reports.
    requests/         Requests: messages, chat templates, options and sampling settings, checked.
    saving/           Quantized checkpoints written from a loaded model.
    scheduling/       Turns of callers: a fair queue, threads that compute, stopping, and clocks.
    submissions       Submitted requests: futures, and the results of many prompts as they finish.
    tensors/          A checkpoint's tensors for torch: opened, mapped and packed.
    torch_dtypes      Table of dtypes, joined with torch's own, and torch's default dtype.
"""
