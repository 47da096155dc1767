"""KV caches: preallocated, quantized, and in host memory.

Modules:
    arena         One block of memory for the KV cache of all layers on a device.
    host          KV cache in host memory: two device buffers hold the layers in use.
    paged         Paged KV cache: pages that the requests of a batch share.
    preallocated  KV cache that is allocated once for the whole context.
    quantized     KV cache in 8 or 4 bits, with the newest tokens unquantized.
"""
