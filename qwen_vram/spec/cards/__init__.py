"""Cards to plan for: their figures, and the rates that times are computed with.

Modules:
    find  Cards by name, and the machine that stands for a card which is not here.
    rows  Table of NVIDIA's cards: memory, rates and links.
"""
