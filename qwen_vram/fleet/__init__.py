"""Plans of fleets: the GPUs that serve a number of users, checked by a simulation.

Modules:
    card_memory  The memory of one card of a replica by part, for each engine.
    command      The command of each server of a fleet, with the options of its engine.
    data         The data of a fleet plan: the options that fulfil the wish, the best first.
    engines      Engines that a fleet can run: their formats, limits and kernels.
    errors       The error for a wish that no fleet fulfils.
    manifests    Files that start a fleet: for Docker Compose, and for Kubernetes.
    options      Options of a fleet: the best division of each card and format, and what is left out.
    plan         `plan_fleet()`: the GPUs, their number, format and division for a number of users.
    question     The question of a fleet plan, checked: model, users, lengths, and the users' wish.
    refusals     Refusals of a fleet plan in words, with the nearest plan that works.
    replica      One replica of a fleet: its GPUs, their memory, and the times of its steps.
    result       The result: the fleets that fulfil the wish, as text, commands and files.
    search       The search: for each card and format, the fewest GPUs whose simulation fulfils the wish.
    simulation/  Requests of a fleet, simulated replicas, and the service that users get.
    text         A fleet plan as text of at most 80 columns.
"""
