"""FLOOR 1: what a model costs. Standard library only; integers of bytes in and out."""
