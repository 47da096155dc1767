"""The worker process of `quantize_gptq()`, with GPTQModel's settings and patches.

Its arguments are the path of a JSON file with the job, and the number of a file descriptor that gets a line per layer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path


def main() -> None:
    """Quantize, and write a checkpoint to the job's `result`."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    done = os.fdopen(int(sys.argv[2]), "w", buffering=1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], offload_to_disk_path=job["offload"])
    model = GPTQModel.load(job["source"], settings, device=job["device"], dtype=getattr(torch, job["dtype"]))

    def layer_is_done(*, layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            print(layer_idx, file=done)

    model.layer_callback = layer_is_done
    # GPTQModel collects garbage several times a matrix. With these objects frozen that takes 3 seconds, not 20.
    gc.collect()
    gc.freeze()
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    model.quantize(samples, batch_size=1, calibration_data_min_length=1, backend=BACKEND.GPTQ_TORCH)
    model.save(job["result"], max_shard_size=job["max_shard_bytes"])


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
