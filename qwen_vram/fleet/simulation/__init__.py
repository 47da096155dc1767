"""Requests of a fleet, simulated replicas, and the service that users get.

Modules:
    lengths   Lengths of prompts and answers: a number, a range, or samples of a real log.
    service   The service of a fleet: the wish of the users, and what a simulation measures.
    simulate  Simulation of one replica: continuous batching with chunked prefill, step by step.
    traffic   Requests that arrive at a fleet: at random times, or at the times that the caller gives.
"""
