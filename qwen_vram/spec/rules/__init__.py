"""Combinations of knobs that are refused, and why.

Modules:
    rule   A rule: one combination of knobs, models or devices that is refused.
    table  The rules for profiles, for models on any machine, and for several GPUs.
"""
