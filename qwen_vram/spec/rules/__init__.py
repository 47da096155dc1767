"""Knobs that exclude each other, and what runs on no machine or on one GPU alone.

Modules:
    rule   A rule: one combination of knobs, models or devices that cannot be. `table` is the list of them.
    table  Rules: knobs that exclude each other, and what runs on no machine or on one GPU alone, in one list.
"""
