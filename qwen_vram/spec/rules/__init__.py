"""Rules for knobs: combinations that are refused.

Modules:
    rule   A rule: one combination of knobs, models or devices that is refused.
    table  Table of rules: knobs that exclude each other or run only on some machines.
"""
