"""Decoder layers and token embeddings that stay on the host or the disk.

Modules:
    blocks          Streamed decoder layers, each one block in host memory or in files.
    build           Building of streamed layers, quantized one tensor at a time.
    cpu_compute     Host layers: decoder layers whose matrix products the CPU computes.
    disk_reader     Disk layers: a thread reads them ahead of use into a ring of host buffers.
    host_embedding  Token embeddings in host memory, from which only the needed rows are copied.
    slot            A slot: a device buffer for the weights of one streamed layer.
    streamer        Streamed layers: copied from host or disk into a ring of slots on the device.
"""
