"""Plans of fleets: which GPUs, and how many, serve a number of users, checked by a simulation.

Modules:
    card_memory  The memory of one card of a replica by part, for each engine.
    command      The command of each server of a fleet. The options of an engine are in one function.
    engines      The engines that a fleet can run: their formats, their limits, and the kernels whose times are predicted.
    errors       The error for a wish that no fleet fulfils.
    lengths      Lengths of prompts and answers: a number, a range, or samples of a real log.
    manifests    Files that start a fleet: a Docker Compose file, and a Kubernetes Deployment with its Service.
    options      The options of a fleet: the best division of each card and format, and the reasons for what is left out.
    plan         `plan_fleet()`: which GPUs, how many, in which format and how divided, for a number of users.
    question     The question that a fleet plan answers, checked: the model, its users, their lengths, and their wish.
    refusals     Refusals of a fleet plan in words: what does not fit, what is too slow, and the nearest that works.
    replica      One replica of a fleet: its GPUs, the memory of each by part, and the times of its steps.
    result       The result: the fleets that fulfil the wish, the best first, as text, data and files.
    search       The search: for each card and format, the fewest GPUs whose simulation fulfils the wish.
    service      The service of a fleet: the wish of the users, and what a simulation measures.
    simulate     Simulation of one replica: continuous batching with chunked prefill, step by step.
    text         A fleet plan as text of at most 80 columns.
    traffic      Requests that arrive at a fleet: at random times, or at the times that the caller gives.
"""
