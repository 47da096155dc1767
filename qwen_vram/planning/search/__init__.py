"""Candidate profiles, least lossy first, and the search for the one to load.

Modules:
    candidates        Candidate profiles from a starting profile, least lossy first.
    decode_graph      Reasons why decode steps are not captured, and the cost of single launches.
    faster            Search for a faster profile with the same formats of weights and KV cache.
    largest_workload  The largest workload that fits a budget, by bisection over the profiles of a search.
    offload_tiers     Tiers of layers: on the device, in host memory, and on the disk.
    savers            Savers that the planner may apply, least lossy first, with their cost.
    search            Search of the candidates, least lossy first, for one that fits the budget.
"""
