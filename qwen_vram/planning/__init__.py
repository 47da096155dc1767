"""Choice of a profile that fits a budget, with a location for each layer.

It is arithmetic over the free memory that the driver reports. The modules do not import torch.

Modules:
    adapter_refusals  Refusals of knobs that do not work with an adapter beside the base.
    capacity/         Memory that devices offer, and the check if an estimate fits it.
    errors            The error for a budget that no plan fits.
    placement         The location of each module of a plan, by the module's name in the model.
    planner           The planner: the first profile that fits a budget, least lossy first.
    questions         Public questions: a plan, a device map, the largest workload, the smallest GPU.
    search/           Candidate profiles, least lossy first, and the search for the one to load.
    sequences         Number of sequences per prompt, by a checkpoint's generation_config.json.
    support           Refusals of profiles that are counted but that no machine can load.
    vllm/             A plan as the arguments of `vllm serve`, by arithmetic alone: vLLM is never imported.
"""
