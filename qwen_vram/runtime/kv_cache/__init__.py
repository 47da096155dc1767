"""KV caches: preallocated, quantized, and in host memory."""
