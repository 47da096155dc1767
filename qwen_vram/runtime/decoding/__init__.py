"""Decode steps that are captured as CUDA graphs, and generation that replays them."""
