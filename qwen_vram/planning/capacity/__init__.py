"""Memory that devices offer, and the check if an estimate fits it.

Modules:
    available_memory  Free memory of this machine: of GPUs by the driver, of the host by the system.
    budget            The budget: bytes that each device offers.
    compiler          The compiler of GPU kernels on this machine.
    fit               Comparison of an estimate with the memory of a budget's devices and host.
    gpu_split         Number of layers on each of several GPUs.
    hardware          Limits of a plan by this machine: missing kernels, and an unmeasured CPU.
    nvml              NVML: the GPUs that CUDA shows, and questions that a driver may not answer.
    refusal           Refusals: the device or host that lacks memory for a plan, in words and bytes.
"""
