"""Simulation of torch's caching allocator, which computes reserved memory.

It uses sizes and order, not tensors. The rules are the defaults of c10/cuda/CUDACachingAllocator.cpp in torch 2.6 to
2.13:

- Sizes are rounded up to 512 bytes.
- Requests up to 1 MiB are cut from segments of 2 MiB, and those below 10 MiB from segments of 20 MiB. Larger ones get
  separate segments, rounded up to 2 MiB.
- A request takes the smallest free block that is large enough. The rest is split off if it is at least 512 bytes
  (small) or more than 1 MiB (large).
- Neighboring free blocks of a segment join.
- If a new segment does not fit the device, segments without a block in use are returned first. Only then is the device
  out of memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from qwen_vram.arithmetic.replay.trace import LayerEvents
from qwen_vram.spec.formats import ALLOCATION_STEP

# The largest request that comes from the small pool.
SMALL = 2**20
# The largest rest of a large block that is not split off.
UNSPLIT = 2**20
_SMALL_SEGMENT = 2 * 2**20
_LARGE_SEGMENT = 20 * 2**20
_OWN_SEGMENT = 10 * 2**20
_SEGMENT_STEP = 2 * 2**20
# Segments are far apart here, so that blocks of different segments are never neighbors. Each is below the one before
# it, because the driver mostly maps new ones lower; the address decides among free blocks of one size.
# Recorded: NVIDIA H100, driver 580, torch 2.11.0+cu130, 2026-11-24.
_TOP, _GAP = 2**80, 2**50
# The driver maps segments of at least _MAPPED bytes in steps of _MAPPED. After a load it maps the first of them above
# all existing ones, up to _ROOM_ABOVE bytes in total.
# Recorded: addresses of Qwen2.5-7B and Qwen3-4B in int8, NVIDIA H200, driver 580, torch 2.11.0+cu130, 2026-11-26. 112,
# 32 and 56 MiB were above, 64 below; 40, 40, 64 and 64 above, 76 below.
_MAPPED = 32 * 2**20
_ROOM_ABOVE = 8 * _MAPPED


class OverLimitError(Exception):
    """A request that exceeds the limit, even after unused segments are returned."""


class CachingAllocator:
    """Counts the bytes that torch would allocate and reserve for the same requests in the same order.

    Attributes:
        limit: The most bytes that may be reserved; `None` is no limit.
        unsplit: The largest rest of a large block, in bytes, that is not split off.
        allocated: Bytes of blocks in use, with rests that were not split off (`torch.cuda.memory_allocated`).
        peak: The most bytes that were allocated at once.
        reserved: Bytes of all segments (`torch.cuda.memory_reserved`).
        peak_reserved: The most bytes that were reserved at once.
    """

    def __init__(self, limit: int | None = None, *, unsplit: int = UNSPLIT) -> None:
        self.limit = limit
        self.unsplit = unsplit
        self.allocated = 0
        self.peak = 0
        self.reserved = 0
        self.peak_reserved = 0
        self._segments = 0
        self._room_above = 0
        # Free blocks by pool (small, large), sorted by size and address; then the begin and the end of each.
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        # Blocks in use: address -> size and pool.
        self._used: dict[int, tuple[int, int]] = {}
        self._segment_sizes: dict[int, int] = {}

    def copy(self, limit: int | None = None) -> CachingAllocator:
        """Make an independent allocator with the same state and another limit."""
        twin = CachingAllocator(limit, unsplit=self.unsplit)
        twin.allocated, twin.peak = self.allocated, self.peak
        twin.reserved, twin.peak_reserved = self.reserved, self.peak_reserved
        twin._segments, twin._room_above = self._segments, self._room_above
        twin._free = (list(self._free[0]), list(self._free[1]))
        twin._size_at, twin._start_before = dict(self._size_at), dict(self._start_before)
        twin._used, twin._segment_sizes = dict(self._used), dict(self._segment_sizes)
        return twin

    def state(self) -> object:
        """The state that determines the addresses of the next blocks, to compare it with a later one."""
        return (tuple(self._free[0]), tuple(self._free[1]), self.reserved, self._room_above)

    def take(self, nbytes: int) -> int:
        """Allocate `nbytes` and return the block's address.

        Raises:
            OverLimitError: more than `limit` bytes would have to be reserved.
        """
        size = -(-nbytes // ALLOCATION_STEP) * ALLOCATION_STEP or ALLOCATION_STEP
        pool = 0 if size <= SMALL else 1
        free = self._free[pool]
        index = bisect_left(free, (size, 0))
        if index < len(free):
            found, address = free.pop(index)
            del self._size_at[address], self._start_before[address + found]
        else:
            found, address = self._new_segment(size, pool)
        rest = found - size
        if rest >= ALLOCATION_STEP if pool == 0 else rest > self.unsplit:
            self._remember(rest, address + size, pool)
            found = size
        self._used[address] = (found, pool)
        self.allocated += found
        if self.allocated > self.peak:
            self.peak = self.allocated
        return address

    def give(self, *addresses: int) -> None:
        """Free blocks; they join free neighbors."""
        size_at, start_before = self._size_at, self._start_before
        for address in addresses:
            size, pool = self._used.pop(address)
            free = self._free[pool]
            self.allocated -= size
            start, end = address, address + size
            after = size_at.pop(end, None)
            if after is not None:
                free.pop(bisect_left(free, (after, end)))
                end += after
                del start_before[end]
            before = start_before.pop(address, None)
            if before is not None:
                free.pop(bisect_left(free, (size_at[before], before)))
                start = before
            size = end - start
            insort(free, (size, start))
            size_at[start] = size
            start_before[end] = start

    # The cache's tensors are in the same pools.
    keep, drop = take, give

    def run(self, layer: LayerEvents) -> int:
        """Run a layer's events as `take` and `give` do; return its result's block, the only one that stays."""
        pools, size_at, start_before = self._free, self._size_at, self._start_before
        allocated, peak, unsplit = self.allocated, self.peak, (0, self.unsplit)
        blocks: list[tuple[int, int, int]] = []  # address, size and pool
        for event in layer.events:
            if event >= 0:
                pool = 0 if event <= SMALL else 1
                free = pools[pool]
                index = bisect_left(free, (event, 0))
                if index < len(free):
                    size, address = free.pop(index)
                    del size_at[address], start_before[address + size]
                else:
                    size, address = self._new_segment(event, pool)
                rest = size - event
                if rest > unsplit[pool]:
                    size, start = event, address + event
                    insort(free, (rest, start))
                    size_at[start] = rest
                    start_before[start + rest] = start
                blocks.append((address, size, pool))
                allocated += size
                if allocated > peak:
                    peak = allocated
                continue
            address, size, pool = blocks[~event]
            free = pools[pool]
            allocated -= size
            end = address + size
            after = size_at.pop(end, None)
            if after is not None:
                free.pop(bisect_left(free, (after, end)))
                end += after
                del start_before[end]
            before = start_before.pop(address, None)
            if before is not None:
                free.pop(bisect_left(free, (size_at[before], before)))
                address = before
            insort(free, (end - address, address))
            size_at[address] = end - address
            start_before[end] = address
        self.allocated, self.peak = allocated, peak
        address, size, pool = blocks[layer.result]
        self._used[address] = (size, pool)
        return address

    def at(self, moment: str) -> None:
        """Ignore the moment, because the pools depend on sizes and order only."""

    def loaded(self) -> None:
        """Return unused segments; the first later ones are mapped above all existing ones."""
        self.release_unused()
        self._room_above = _ROOM_ABOVE

    def release_unused(self) -> None:
        """Return segments without a block in use to the device, as `torch.cuda.empty_cache` does."""
        for pool in (0, 1):
            for size, address in list(self._free[pool]):
                if self._segment_sizes.get(address) == size:
                    self._drop(size, address, pool)
                    del self._segment_sizes[address]
                    self.reserved -= size
                    if address > _TOP:
                        self._room_above += _mapped(size)

    def _new_segment(self, size: int, pool: int) -> tuple[int, int]:
        if pool == 0:
            segment = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            segment = _LARGE_SEGMENT
        else:
            segment = -(-size // _SEGMENT_STEP) * _SEGMENT_STEP
        if self.limit is not None and self.reserved + segment > self.limit:
            self.release_unused()
            if self.reserved + segment > self.limit:
                raise OverLimitError
        self._segments += 1
        address = _TOP - self._segments * _GAP
        if segment >= _MAPPED and _mapped(segment) <= self._room_above:
            self._room_above -= _mapped(segment)
            address += 2 * _TOP
        self._segment_sizes[address] = segment
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return segment, address

    def _remember(self, size: int, address: int, pool: int) -> None:
        insort(self._free[pool], (size, address))
        self._size_at[address] = size
        self._start_before[address + size] = address

    def _drop(self, size: int, address: int, pool: int) -> None:
        free = self._free[pool]
        free.pop(bisect_left(free, (size, address)))
        del self._size_at[address], self._start_before[address + size]


def _mapped(segment: int) -> int:
    """Bytes of addresses that a segment occupies."""
    return -(-segment // _MAPPED) * _MAPPED
