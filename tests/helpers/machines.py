"""Described machines for the doctor: a good one of each kind, into which tests plant faults."""

from __future__ import annotations

from qwen_vram.diagnosis.machine_facts import Gpu, MachineFacts

GIB = 2**30
VERSIONS = {
    "qwen-vram": "0.1.0",
    "torch": "2.13.0+cu130",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "triton": "3.7.0",
}
H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    total=80 * GIB,
    free=79 * GIB,
    capability=(9, 0),
    width=16,
    width_max=16,
    generation=1,
    generation_max=5,
)
RTX_4090 = Gpu(
    name="NVIDIA GeForce RTX 4090",
    total=24 * GIB,
    free=23 * GIB,
    capability=(8, 9),
    width=16,
    width_max=16,
    generation=4,
    generation_max=4,
)
CPU_ONLY = MachineFacts(
    system="Linux 6.18.0",
    python="3.11.7",
    cpu="AMD EPYC",
    cores=16,
    ram_total=128 * GIB,
    ram_available=120 * GIB,
    versions=VERSIONS,
    host_rate=20e9,
)
WITH_H100 = MachineFacts(
    system="Linux 6.18.0",
    python="3.11.7",
    cpu="AMD EPYC",
    cores=16,
    ram_total=128 * GIB,
    ram_available=120 * GIB,
    memlock=8 * GIB,
    gpus=(H100,),
    driver="580.159.04",
    versions=VERSIONS,
    host_rate=20e9,
    pinned_rate=55e9,
    unpinned_rate=7.4e9,
)
