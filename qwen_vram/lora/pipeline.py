"""The merge pipeline: threads read, merge, store and check pieces of rows.

A thread processes a piece in all steps, so reading, computing and writing overlap, and the memory in use is a few
pieces. The scales and sums of the pieces are combined when a weight's last piece is done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qwen_vram.checkpoints.output.safetensors_layout import Shard
from qwen_vram.lora.codecs.base import Codec
from qwen_vram.lora.codecs.scratch import scratch
from qwen_vram.lora.codecs.threads import compute_alone
from qwen_vram.lora.delta import LoadedUpdate
from qwen_vram.lora.fidelity import Blocks, Proof
from qwen_vram.lora.slots import Weight
from qwen_vram.lora.targets import Target
from qwen_vram.lora.tensor_file import byte_pieces, pieces
from qwen_vram.runtime.saving.writer import CheckpointWriter

# With more threads than this, threads wait for the disk.
_MOST_THREADS = 8
# Weights whose factors are in memory at a time, so that threads have work while the last piece of one is done.
_UNDER_WAY = 4


@dataclass(slots=True)
class _Job:
    """A weight that is being merged.

    Attributes:
        dense: Its pieces, if they keep the base's dtype.
        quantized: Its pieces, if they are quantized: their scales, and the sums to correct when the scales are final.
    """

    shard: Shard[Weight]
    weight: Weight
    updates: list[LoadedUpdate]
    proof: Proof = field(default_factory=Proof)
    dense: list[Future[None]] = field(default_factory=list)
    quantized: list[Future[tuple[torch.Tensor, Blocks | None]]] = field(default_factory=list)


class Streamer:
    """Writer of all weights of the plan's shards.

    Args:
        advance: Called by any thread with the number of the base's bytes that were processed.
    """

    def __init__(self, writer: CheckpointWriter, device: torch.device, advance: Callable[[int], None]) -> None:
        self.writer = writer
        self.device = device
        self.advance = advance
        self.proofs: dict[str, Proof] = {}

    def run(self, shards: tuple[Shard[Weight], ...]) -> dict[str, Proof]:
        """Write the shards, and return the proofs of the weights that the adapters change, by name."""
        under_way: deque[_Job] = deque()
        self.missing = Counter({shard.file: len(shard.weights) for shard in shards})
        with _threads() as self.pool:
            for shard in shards:
                self.writer.open(shard)
                for weight in shard.weights:
                    under_way.append(self._start(shard, weight))
                    if len(under_way) > _UNDER_WAY:
                        self._finish(under_way.popleft())
            while under_way:
                self._finish(under_way.popleft())
        return self.proofs

    def _start(self, shard: Shard[Weight], weight: Weight) -> _Job:
        target, codec = weight.target, weight.codec
        target.base.announce()
        job = _Job(shard, weight, [LoadedUpdate(update, target.base, self.device) for update in target.updates])
        columns = torch.Size(target.shape[1:]).numel()
        if codec is not None:
            bounds = pieces(target.shape[0], columns, step=codec.row_step(columns))
            job.quantized = [self.pool.submit(self._quantize, job, codec, *rows) for rows in bounds]
        elif target.updates:
            job.dense = [self.pool.submit(self._round, job, *rows) for rows in pieces(target.shape[0], columns)]
        else:
            job.dense = [self.pool.submit(self._copy, job, *some) for some in byte_pieces(target.base.nbytes)]
        return job

    def _finish(self, job: _Job) -> None:
        """Wait for a weight's pieces, write the tensors that need all of them, and finish the shard after its last."""
        target, codec = job.weight.target, job.weight.codec
        for piece in job.dense:
            piece.result()
        if codec is not None:
            done = [piece.result() for piece in job.quantized]
            rest, scales = codec.finish(torch.cat([raw for raw, _ in done]), target.shape, target.base.dtype)
            for ending, tensor in rest.items():
                self.writer.write(f"{target.name.removesuffix('.weight')}{ending}", tensor)
            for (_, blocks), final in zip(done, torch.split(scales, [len(raw) for raw, _ in done]), strict=True):
                if blocks is not None:
                    job.proof.settle(blocks, final)
        if job.updates:
            self.proofs[target.name] = job.proof
        self.missing[job.shard.file] -= 1
        if not self.missing[job.shard.file]:
            self.writer.finish(job.shard)

    def _copy(self, job: _Job, start: int, stop: int) -> None:
        """Copy some bytes unchanged."""
        self.writer.write(job.weight.target.name, job.weight.target.base.read_bytes(start, stop), start)
        self.advance(stop - start)

    def _round(self, job: _Job, start: int, stop: int) -> None:
        """Merge a piece into the base's own dtype, and add it to the proof."""
        base, merged, rounded = self._merged(job, start, stop)
        self.writer.write(job.weight.target.name, rounded, start * rounded[0].nbytes)
        job.proof.add(base, merged, scratch("stored", rounded.shape, torch.float32, self.device).copy_(rounded))

    def _quantize(self, job: _Job, codec: Codec, start: int, stop: int) -> tuple[torch.Tensor, Blocks | None]:
        """Merge a piece into codes; return its scales, and the sums to correct when they are final."""
        base, merged, rounded = self._merged(job, start, stop)
        codes, scales = codec.encode(rounded)
        self.writer.write(job.weight.target.name, codes, start * rounded.shape[1] * codec.bits // 8)
        if not job.updates:
            return scales, None
        decoded = codec.decode(codes, scales, rounded.shape)
        if codec.scales_wait:
            return scales, job.proof.add_blocks(base, merged, decoded, scales, codec.group_size)
        job.proof.add(base, merged, decoded)
        return scales, None

    def _merged(self, job: _Job, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stored = job.weight.target.base
        self.advance((stop - start) * stored.nbytes // stored.num_rows)
        return merged_rows(job.weight.target, job.updates, start, stop, self.device)


def merged_rows(
    target: Target, updates: Sequence[LoadedUpdate], start: int, stop: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows of the base in float32, of the merge in float32, and of the merge in the base's dtype.

    They are valid until this thread's next piece.
    """
    stored = target.base
    shape = (stop - start, *stored.shape[1:])
    raw = scratch("raw", shape, stored.dtype)
    known = max(min(stop, stored.num_rows) - start, 0)
    raw[known:] = 0  # rows of a larger vocabulary, which the base does not have
    stored.read(start, start + known, into=raw[:known])
    base = merged = scratch("base", shape, torch.float32, device).copy_(raw)
    for number, update in enumerate(updates):
        merged = update.add_to(merged, base, start, stop) if number else update.apply(base, start, stop)
    return base, merged, scratch("raw", shape, stored.dtype, device).copy_(merged)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Run threads that each compute alone, in plain float32. After an error, pieces that have not begun are dropped."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    # A piece is too small to be divided: threads that wait for each other would lose half their time.
    pool = ThreadPoolExecutor(min(threads, _MOST_THREADS), thread_name_prefix="merge", initializer=compute_alone)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
