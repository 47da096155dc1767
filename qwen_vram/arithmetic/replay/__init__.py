"""Simulation of torch's caching allocator over the allocations of a load and a generation."""
