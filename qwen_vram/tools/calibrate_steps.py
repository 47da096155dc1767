"""Steps of `qwen-vram calibrate`: each measures one thing in its process.

`python -m qwen_vram.tools.calibrate_steps STEP` prints the result of a step as one line of JSON. Only the steps import
torch, because `calibrate` imports this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen_vram.checkpoints.machine_file import CalibrationError, make_folder

if TYPE_CHECKING:
    import torch

RESULT = "RESULT "

# A copy buffer is 1 GiB, or a quarter of the free memory, but never small enough for a cache to hold it.
_BUFFER = 2**30
_SMALLEST_BUFFER = 2**28
_CACHES = 4
_WARM_UP = 3
_REPEATS = 15


def no_gpu() -> str | None:
    """Return why there is no GPU to measure, and what to do; `None` if there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build (https://pytorch.org)"
    return "torch sees none: check nvidia-smi and CUDA_VISIBLE_DEVICES"


def measure_context() -> dict[str, Any]:
    """Return the process memory in bytes after one tensor was copied to the device, and the names of the machine."""
    import torch

    device = torch.device("cuda", 0)
    on_device = torch.ones(2**20).to(device)
    taken = _beside_torch(device)
    del on_device
    name = torch.cuda.get_device_name(device)
    return {"context": taken, "device": name, "torch": torch.__version__, "driver": _driver()}


def measure_kernels(weights: str) -> dict[str, Any]:
    """Return the bytes of context and kernels, after the bundled model was loaded and has generated."""
    import qwen_vram as qv
    from qwen_vram.demo import CHECKPOINT

    # Long answers load more kernels than short ones, because attention over longer caches is split differently.
    workload: dict[str, Any] = {"prompt_len": 1024, "max_new_tokens": 512}
    with qv.load(CHECKPOINT, profile="default", weights=weights, **workload, progress=False) as llm:
        llm.probe()
        return {f"kernels-{weights}": _beside_torch(llm.device)}


def _beside_torch(device: torch.device) -> int | None:
    """Return this process's memory by nvidia-smi less torch's reserved memory; `None` if the driver does not tell."""
    import torch

    from qwen_vram.runtime.measure import process_bytes

    torch.cuda.synchronize(device)
    shown = process_bytes(device)
    taken = 0 if shown is None else shown - torch.cuda.memory_reserved(device)
    return taken if taken > 0 else None


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return "unknown"
    return version if isinstance(version, str) else str(version.decode())


def measure_rates() -> dict[str, Any]:
    """Return rates in bytes a second: within the device, and from pinned host memory to it."""
    import torch

    from qwen_vram.planning.capacity.available_memory import available_ram

    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    on_device = buffer_size(free, least=max(_SMALLEST_BUFFER, _CACHES * cache), where="on the GPU")
    on_host = buffer_size(available_ram(), least=_SMALLEST_BUFFER, where="of host memory")
    return {
        "device_bandwidth": _device_bandwidth(device, on_device),
        "pinned_copy_rate": _pinned_copy_rate(device, min(on_device, on_host)),
    }


def measure_copies() -> dict[str, Any]:
    """Return the rate in bytes a second within host memory."""
    from qwen_vram.planning.capacity.available_memory import available_ram

    size = buffer_size(available_ram(), least=_SMALLEST_BUFFER, where="of host memory")
    return {"host_bandwidth": host_bandwidth(size)}


def measure_disk() -> dict[str, Any]:
    """Return the rate of reads from a new file in the cache folder, in bytes a second.

    It is `None` if the page cache cannot be emptied.
    """
    from qwen_vram.tools.disk_rate import disk_read_rate

    return {"disk_read_rate": disk_read_rate(make_folder().parent, _BUFFER)}


def buffer_size(free: int, *, least: int, where: str) -> int:
    """Return the bytes of a copy buffer if `free` bytes are free.

    Raises:
        CalibrationError: a buffer that is larger than the caches would leave too little memory.
    """
    size = min(max(_BUFFER, least), free // 4)
    if size < least:
        raise CalibrationError(f"{free:,} bytes are free {where}, {4 * least:,} are needed", what="rates")
    return size


def _device_bandwidth(device: torch.device, size: int) -> int:
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return int(2 * size / _device_seconds(lambda: target.copy_(source)))


def _pinned_copy_rate(device: torch.device, size: int) -> int:
    import torch

    source = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return int(size / _device_seconds(lambda: target.copy_(source, non_blocking=True)))


def _device_seconds(copy: Callable[[], object]) -> float:
    """Return the median seconds of several copies, by CUDA events."""
    import torch

    event: Any = torch.cuda.Event  # its constructor has no types
    times: list[float] = []
    for _ in range(_WARM_UP + _REPEATS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        copy()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[_WARM_UP:])


def host_bandwidth(size: int) -> int:
    """Return the bytes a second of a copy of `size` bytes within host memory, by all threads that torch uses."""
    import torch

    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(_WARM_UP + _REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return int(2 * size / statistics.median(times[_WARM_UP:]))


def measure_launches() -> dict[str, Any]:
    """Return the times of launches and small kernels, and the rate of products of many rows."""
    import torch

    from qwen_vram.tools.launch_times import graph_node_time, layer_launch_time, matmul_rate

    device = torch.device("cuda", 0)
    return {
        "layer_launch_time": layer_launch_time(),
        "graph_node_time": graph_node_time(device),
        "matmul_rate": matmul_rate(device),
    }


def measure_products() -> dict[str, Any]:
    """Return the CPU's name and the rates of its products; the one in 4 bits is `None` if there is no kernel."""
    import torch

    from qwen_vram.planning.capacity.available_memory import available_ram
    from qwen_vram.tools.product_rates import host_name, many_rows_rate, packed_product_rate, plain_product_rate

    size = buffer_size(available_ram(), least=_SMALLEST_BUFFER, where="of host memory")
    return {
        "host": host_name(),
        "torch": torch.__version__,
        "host_product_rate": plain_product_rate(size),
        "host_4bit_rate": packed_product_rate(size),
        "host_matmul_rate": many_rows_rate(),
    }


def main() -> None:
    """Run the command line: print the result of one step."""
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "gpu": lambda: {"no_gpu": no_gpu()},
        "context": measure_context,
        "kernels-bf16": lambda: measure_kernels("bf16"),
        "kernels-nf4": lambda: measure_kernels("nf4"),
        "rates": measure_rates,
        "launches": measure_launches,
        "copies": measure_copies,
        "products": measure_products,
        "disk": measure_disk,
    }
    parser = argparse.ArgumentParser(prog="python -m qwen_vram.tools.calibrate_steps", description=__doc__)
    parser.add_argument("step", choices=steps)
    print(RESULT + json.dumps(steps[parser.parse_args().step]()), flush=True)


if __name__ == "__main__":
    main()
