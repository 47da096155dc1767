"""The merge itself: pieces of rows read, merged, stored and proved by a few threads, weight after weight.

A thread carries a piece through all steps, so that reading, computing and writing overlap and the memory in use is a
few pieces. Double quantization needs the scales of a whole tensor first; there the pieces wait in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from qwen_vram.lora.delta import LoadedUpdate
from qwen_vram.lora.layout import Shard, Weight
from qwen_vram.lora.proof import Proof
from qwen_vram.lora.stored import byte_pieces, pieces
from qwen_vram.lora.writer import CheckpointWriter

# More threads than this wait for the disk.
_MOST_THREADS = 8
# Elements of weights whose pieces may wait at a time, a single weight apart: 6.5 bytes each.
_WAITING = 2**26


class _Waiting(NamedTuple):
    """A piece whose scales are not final: its codes, the base's rows, and the merged rows in float32."""

    codes: torch.Tensor
    base: torch.Tensor
    merged: torch.Tensor


class _Piece(NamedTuple):
    """What is left of a piece after it was written: its scales, and itself where it has to wait."""

    scales: torch.Tensor | None
    waiting: _Waiting | None


@dataclass(slots=True)
class _Job:
    """A weight under way."""

    shard: Shard
    weight: Weight
    loaded: list[LoadedUpdate]
    proof: Proof = field(default_factory=Proof)
    pieces: list[Future[_Piece]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return torch.Size(self.weight.target.shape).numel()


class Streamer:
    """Writes every weight of the plan's shards.

    Args:
        advance: Called with the number of bytes of the base that were dealt with, by any thread.
    """

    def __init__(self, writer: CheckpointWriter, device: torch.device, advance: Callable[[int], None]) -> None:
        self.writer = writer
        self.device = device
        self.advance = advance

    def run(self, shards: tuple[Shard, ...]) -> dict[str, Proof]:
        """Write the shards; the proofs of the weights that the adapters change, by name."""
        proofs: dict[str, Proof] = {}
        under_way: deque[_Job] = deque()
        with _threads() as self.pool:
            for shard in shards:
                self.writer.open(shard)
                for weight in shard.weights:
                    under_way.append(self._start(shard, weight))
                    while len(under_way) > 1 and sum(job.numel for job in under_way) > _WAITING:
                        self._finish(under_way.popleft(), proofs)
            while under_way:
                self._finish(under_way.popleft(), proofs)
        return proofs

    def _start(self, shard: Shard, weight: Weight) -> _Job:
        target, codec = weight.target, weight.codec
        job = _Job(shard, weight, [LoadedUpdate(update, target.base, self.device) for update in target.updates])
        if codec is None and not target.updates:
            job.pieces = [
                self.pool.submit(self._copy, job, start, stop) for start, stop in byte_pieces(target.base.nbytes)
            ]
            return job
        columns = torch.Size(target.shape[1:]).numel()
        step = 1 if codec is None else codec.row_step(columns)
        job.pieces = [
            self.pool.submit(self._merge, job, start, stop)
            for start, stop in pieces(target.shape[0], columns, step=step)
        ]
        return job

    def _copy(self, job: _Job, start: int, stop: int) -> _Piece:
        """Carry a piece over as it is."""
        self.writer.write(job.weight.target.name, job.weight.target.base.read_bytes(start, stop), start)
        self.advance(stop - start)
        return _Piece(None, None)

    def _merge(self, job: _Job, start: int, stop: int) -> _Piece:
        """Merge a piece, write its codes, and prove it unless its scales have to wait."""
        target, codec = job.weight.target, job.weight.codec
        base = self._base_rows(job, start, stop)
        merged = rows = base.float()
        for number, update in enumerate(job.loaded):
            merged = update.add_to(merged, rows, start, stop) if number else update.apply(rows, start, stop)
        rounded = merged.to(target.base.dtype)
        self.advance((stop - start) * target.base.nbytes // target.base.num_rows)
        if codec is None:
            self.writer.write(target.name, rounded, start * rounded[0].nbytes)
            job.proof.add(rows, merged, rounded.to(torch.float32, copy=True))
            return _Piece(None, None)
        codes, scales = codec.encode(rounded)
        self.writer.write(target.name, codes, start * rounded.shape[1] * codec.bits // 8)
        if not job.loaded:
            return _Piece(scales, None)
        if codec.scales_wait:
            return _Piece(scales, _Waiting(codes, base, merged))
        job.proof.add(rows, merged, codec.decode(codes, scales, rounded.shape))
        return _Piece(scales, None)

    def _base_rows(self, job: _Job, start: int, stop: int) -> torch.Tensor:
        """The base's rows as they are stored; zeros for rows that a larger vocabulary adds."""
        base = job.weight.target.base
        known = base.read(min(start, base.num_rows), min(stop, base.num_rows)).to(self.device)
        added = stop - start - len(known)
        return torch.cat([known, known.new_zeros(added, *base.shape[1:])]) if added else known

    def _finish(self, job: _Job, proofs: dict[str, Proof]) -> None:
        """Wait for a weight's pieces, write what needs all of them, and close its shard after its last weight."""
        target, codec = job.weight.target, job.weight.codec
        done = [piece.result() for piece in job.pieces]
        if codec is not None:
            scales = [piece.scales for piece in done if piece.scales is not None]
            rest, final = codec.finish(torch.cat(scales), target.shape, target.base.dtype)
            for ending, tensor in rest.items():
                self.writer.write(f"{target.name.removesuffix('.weight')}{ending}", tensor)
            own = torch.split(final, [len(piece) for piece in scales])
            self._prove(job, [(piece.waiting, own[number]) for number, piece in enumerate(done)])
        if job.loaded:
            proofs[target.name] = job.proof
        if job.weight is job.shard.weights[-1]:
            self.writer.finish(job.shard)

    def _prove(self, job: _Job, done: list[tuple[_Waiting | None, torch.Tensor]]) -> None:
        """Count the pieces that waited for their scales."""
        codec = job.weight.codec
        assert codec is not None
        decode = codec.decode

        def prove(piece: _Waiting, scales: torch.Tensor) -> None:
            job.proof.add(piece.base.float(), piece.merged, decode(piece.codes, scales, piece.base.shape))

        for proved in [self.pool.submit(prove, piece, scales) for piece, scales in done if piece is not None]:
            proved.result()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone, in plain float32. After an error, what has not begun is dropped."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    # A piece is too small to be divided, and threads that wait for each other waste half their time.
    pool = ThreadPoolExecutor(
        min(threads, _MOST_THREADS), thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
