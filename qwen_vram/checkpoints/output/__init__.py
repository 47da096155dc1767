"""Output of a new checkpoint: its layout, and a folder that appears only when complete.

Modules:
    folder              The output folder, which one atomic rename puts in its place.
    interrupts          Delay of Ctrl-C while files are moved or removed.
    safetensors_layout  Layout of a new checkpoint: shards, offsets and headers, computed before writing.
"""
