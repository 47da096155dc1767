"""Storage formats of merged weights, encoded some rows at a time.

Modules:
    base         The interface of a storage format for merged weights.
    bnb_4bit     NF4 and FP4 of bitsandbytes, encoded some rows at a time.
    registry     The formats that a merged weight can be quantized to, by name, and int8.
    scratch      Buffers that a thread reuses for every piece of a merge.
    threads      Limits on the number of threads that torch computes with.
    weight_only  int4, int8-wo and fp8, encoded some rows at a time.
"""
