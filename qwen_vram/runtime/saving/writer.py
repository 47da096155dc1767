"""Writer of tensors into safetensors files, in place and from any thread."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from qwen_vram.checkpoints.files.names import INDEX
from qwen_vram.checkpoints.output.safetensors_layout import Shard, header

# Bytes after which writing to the disk starts. The system itself would wait for 10 % of memory or for seconds, and then
# have less time for the rest.
_SYNC_BYTES = 2**28


class CheckpointWriter:
    """Writer of one checkpoint's shards into a folder. Files are valid after `finish()`, and safe after `close()`."""

    def __init__(self, folder: Path, shards: tuple[Shard[Any], ...]) -> None:
        self._folder = folder
        self._shards = shards
        self._places = {name: (shard, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._late: dict[str, torch.Tensor] = {}
        self._descriptors: dict[str, int] = {}
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="fsync")
        self._synced: list[Future[None]] = []
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self._lock = Lock()
        self._unsynced = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in finished shards."""
        return self._total_bytes

    def open(self, shard: Shard[Any]) -> None:
        """Create the file of `shard`, with space for all tensors of known size."""
        descriptor = os.open(self._folder / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors[shard.file] = descriptor
        os.truncate(descriptor, shard.data_end)

    def write(self, name: str, tensor: torch.Tensor, at: int = 0) -> None:
        """Write `tensor` into the slot called `name`, from byte `at` of it on."""
        if name not in self._places:
            self._late[name] = tensor
            return
        shard, offset = self._places[name]
        _write_all(self._descriptors[shard.file], tensor, offset + at)
        with self._lock:
            self._unsynced += tensor.nbytes
            if self._unsynced >= _SYNC_BYTES:
                self._unsynced = 0
                self._synced.append(self._syncer.submit(os.fdatasync, self._descriptors[shard.file]))

    def finish(self, shard: Shard[Any]) -> None:
        """Append the tensors of unknown size, write the header, and start writing the file to the disk."""
        descriptor = self._descriptors[shard.file]
        end = shard.data_end
        sizes = []
        for slot in shard.slots:
            size = slot.nbytes
            if slot.shape is None:
                late = self._late.pop(slot.name)
                size = late.nbytes
                assert size <= slot.nbytes, f"{slot.name} takes {size} bytes, {slot.nbytes} were set aside"
                _write_all(descriptor, late, end)
                end += size
            sizes.append(size)
            self._weight_map[slot.name] = shard.file
        _write_all(descriptor, _as_tensor(header(shard.slots, sizes, length=shard.header_bytes)), 0)
        self._total_bytes += sum(sizes)
        self._synced.append(self._syncer.submit(self._sync, shard.file))

    def _sync(self, file: str) -> None:
        os.fsync(self._descriptors[file])
        os.close(self._descriptors.pop(file))

    def close(self) -> None:
        """Wait until every file is on the disk, and write the index if there are several files."""
        for synced in self._synced:
            synced.result()
        if len(self._shards) > 1:
            sizes = {"total_size": self._total_bytes}
            index = {"metadata": sizes, "weight_map": dict(sorted(self._weight_map.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close every file in its present state; does nothing after `close()`."""
        self._syncer.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _write_all(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
