"""A machine: memory of GPU and driver, and rates; defaults until they are measured.

`qwen-vram calibrate` measures a machine, and `machine_file` stores it.
"""

from typing import Any, Literal, NamedTuple

# nvidia-smi's figure minus torch's reserved bytes in a fresh process. The first is after a load of 16-bit weights. The
# second is the addition by its generations, 82 to 136 MB (the most with 512 decode steps). An H100 shows 12 MB less.
# measured: NVIDIA H200, driver 580, torch 2.11.0+cu130, transformers 5.17.0, 2026-11-22.
CUDA_CONTEXT = 649_068_544
LAZY_KERNELS = 136_314_880
# measured: NVIDIA H200 (device-to-device copy, bytes read plus written), torch 2.11, 2026-10-28.
DEVICE_BANDWIDTH = 4_300_000_000_000
# measured: NVIDIA H200, pinned host memory to the device, torch 2.11, 2026-11-22.
PINNED_COPY_RATE = 55_200_000_000
# measured: 3.56 and 3.85 GB/s, the disk of a virtual machine with 2 cores, tools.disk_rate, 2026-11-25; rounded down.
DISK_READ_RATE = 3_500_000_000
# 32,000 tokens of Qwen2.5-7B in bf16, in chunks of 4,096, take 1.12 s in products, without attention.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-26, benchmarks/results/caps_chunks.jsonl.
MATMUL_RATE = 620_000_000_000_000
# 28 layers of Qwen2.5-7B in bf16, launched by Python, took 18.1 to 24.3 ms a token on different hosts of an H200. On a
# host of an H100 they took 21.6. This is the middle.
# measured: torch 2.11.0+cu130, 2026-11-25 to 29, benchmarks/results: decode, auto_plans and streaming_speed.
LAYER_LAUNCH_TIME = 695_000
# The kernels between products, 24 in each of 28 layers, took 1.47 ms in a step.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-26, benchmarks/results/decode.jsonl ("other" of uncompiled steps).
GRAPH_NODE_TIME = 2_200

# Every figure by its field, with its name in texts and its unit.
FIGURES = {
    "cuda_context": ("CUDA context", "bytes"),
    "lazy_kernels": ("kernels loaded on first use", "bytes"),
    "device_bandwidth": ("device memory, read plus written", "bytes/s"),
    "pinned_copy_rate": ("pinned host memory to device", "bytes/s"),
    "host_bandwidth": ("host memory, read plus written", "bytes/s"),
    "host_product_rate": ("CPU products, 16-bit weights", "bytes/s"),
    "host_4bit_rate": ("CPU products, 4-bit weights", "bytes/s"),
    "host_matmul_rate": ("CPU products, many rows", "FLOP/s"),
    "disk_read_rate": ("disk of the cache folder", "bytes/s"),
    "matmul_rate": ("products of many rows", "FLOP/s"),
    "layer_launch_time": ("launching a layer from Python", "ns"),
    "graph_node_time": ("a small kernel in a CUDA graph", "ns"),
}
# Figures that older files lack: they then have the default values.
_LATER = (
    "host_product_rate",
    "host_4bit_rate",
    "host_matmul_rate",
    "matmul_rate",
    "layer_launch_time",
    "graph_node_time",
    "host",
    "host_4bit_kernel",
)
_TEXTS = ("device", "torch", "driver", "date", "host")


class Machine(NamedTuple):
    """One GPU with its host and its versions.

    Attributes:
        device: The GPU's name, as torch and the driver state it.
        cuda_context: Bytes that nvidia-smi shows in addition to torch's reserved ones, after a tensor is on the device.
        lazy_kernels: Bytes that a load and a generation add to `cuda_context`.
        device_bandwidth: Bytes a second of a copy within device memory, read plus written.
        pinned_copy_rate: Bytes a second from pinned host memory to the device.
        host_bandwidth: Bytes a second of a copy within host memory, read plus written; `None` if it was not measured.
        host_product_rate: Bytes a second of 16-bit weights that the CPU multiplies with one row; `None` if it was not
            measured.
        host_4bit_rate: The same for bitsandbytes' 4-bit weights; `None` also if the CPU has no kernel for them.
        host_matmul_rate: Operations a second of a 16-bit product of many rows on the CPU; `None` if it was not
            measured.
        disk_read_rate: Bytes a second of reads from a file that is not in the page cache.
        matmul_rate: Operations a second of a 16-bit product of many rows on the device.
        layer_launch_time: Nanoseconds that Python takes to launch one decoder layer in 16 bits.
        graph_node_time: Nanoseconds that a small kernel takes in a captured step.
        host: The CPU's name and cores; empty in older files.
        host_4bit_kernel: The CPU is not known to lack a kernel for bitsandbytes' 4-bit weights.
        torch, driver, date: The versions and the date (ISO) of the measurement.
        source: `"measured"` by `qwen-vram calibrate`, or `"default"` for the library's stated figures.
        kept: Figures of a measured machine that could not be measured and have the default values.
    """

    device: str
    cuda_context: int
    lazy_kernels: int
    device_bandwidth: int
    pinned_copy_rate: int
    host_bandwidth: int | None
    disk_read_rate: int
    torch: str
    driver: str
    date: str
    source: Literal["measured", "default"]
    kept: tuple[str, ...] = ()
    host_product_rate: int | None = None
    host_4bit_rate: int | None = None
    host_matmul_rate: int | None = None
    matmul_rate: int = MATMUL_RATE
    layer_launch_time: int = LAYER_LAUNCH_TIME
    graph_node_time: int = GRAPH_NODE_TIME
    host: str = ""
    host_4bit_kernel: bool = True

    @property
    def key(self) -> str:
        """The key that it is stored under. A change of the GPU or of torch's version makes another machine."""
        return f"{self.device}, torch {self.torch}"

    def is_measured(self, figure: str) -> bool:
        """Tell if `qwen-vram calibrate` measured a figure, so that it is not a stated default."""
        return self.source == "measured" and figure not in self.kept and getattr(self, figure) is not None

    def __str__(self) -> str:
        """The versions, and a line for each figure with its origin."""
        lines = [f"{self.key}, driver {self.driver}, {self.date}"]
        for name, (label, unit) in FIGURES.items():
            value = getattr(self, name)
            number = "none" if value is None else f"{value:,} {unit}"
            lines.append(f"  {label:34}{number:>28}  {'measured' if self.is_measured(name) else 'default'}")
        return "\n".join(lines)


DEFAULT = Machine(
    device="NVIDIA H200",
    cuda_context=CUDA_CONTEXT,
    lazy_kernels=LAZY_KERNELS,
    device_bandwidth=DEVICE_BANDWIDTH,
    pinned_copy_rate=PINNED_COPY_RATE,
    host_bandwidth=None,
    disk_read_rate=DISK_READ_RATE,
    torch="2.11.0+cu130",
    driver="580",
    date="2026-11-22",
    source="default",
)


def parse_machine(data: object) -> Machine:
    """Make a measured machine from plain data, such as the contents of a file.

    Raises:
        ValueError: a field is missing or unknown, has another type, or is not a size or rate that a computer can have.
    """
    names = set(Machine._fields)
    if not isinstance(data, dict) or data.keys() | set(_LATER) != names:
        raise ValueError(f"a machine has the fields {', '.join(sorted(names))} and no other")
    values: dict[str, Any] = {name: getattr(DEFAULT, name) for name in _LATER} | data
    for name in _TEXTS:
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is no text")
    for name in FIGURES:
        if name in _LATER and values[name] is None and getattr(DEFAULT, name) is None:
            continue
        # The smallest GPU has kernels to load, but a driver may have loaded them with the context.
        least = 0 if name == "lazy_kernels" else 1
        if type(values[name]) is not int or not least <= values[name] < 2**63:
            raise ValueError(f"{name} is no number of {FIGURES[name][1]}")
    if type(values["host_4bit_kernel"]) is not bool:
        raise ValueError("host_4bit_kernel is neither true nor false")
    kept = values["kept"]
    if values["source"] != "measured" or not isinstance(kept, list) or not all(name in list(FIGURES) for name in kept):
        raise ValueError("source or kept is none that calibrate writes")
    missing = [name for name in FIGURES if name not in data and values[name] is not None]
    return Machine(**{**values, "kept": (*kept, *missing)})
