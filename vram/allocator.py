"""What torch's own caching allocator takes from a card for a sequence of requests: a simulation, without card or torch.

Rules and numbers are those of c10/cuda/CUDACachingAllocator.cpp (newer torch keeps the constants in c10/core/AllocatorConfig.h)
with default settings: no `max_split_size_mb`, no `expandable_segments`, no `roundup_power2_divisions`, one stream.
ComfyUI's default on most NVIDIA cards is cudaMallocAsync, which is another allocator: this does not simulate it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

MIN_BLOCK: Final = 512
"""kMinBlockSize: every request is rounded up to a multiple of it."""
SMALL_REQUEST: Final = 1 << 20
"""kSmallSize: requests up to this come out of the small segments."""
SMALL_SEGMENT: Final = 2 << 20
"""kSmallBuffer: what is taken from the card for a small request."""
LARGE_SEGMENT: Final = 20 << 20
"""kLargeBuffer: what is taken for a request above kSmallSize and below kMinLargeAlloc."""
OWN_SEGMENT: Final = 10 << 20
"""kMinLargeAlloc: a request from this on gets a segment of its own,"""
SEGMENT_ROUND: Final = 2 << 20
"""kRoundLarge: of a multiple of this."""


class Reserved(NamedTuple):
    """Peaks in bytes."""

    allocated: int
    """torch.cuda.max_memory_allocated: whole blocks, so a little more than what the tensors ask for."""
    reserved: int
    """torch.cuda.max_memory_reserved: the segments taken from the card."""
    requested: int
    """What was asked for."""


def rounded(nbytes: int) -> int:
    """`nbytes` as the allocator counts it: a multiple of 512, at least 512 (round_size)."""
    return max(MIN_BLOCK, -(-nbytes // MIN_BLOCK) * MIN_BLOCK)


def segment_bytes(size: int) -> int:
    """What is taken from the card for a rounded request that no cached block serves (get_allocation_size)."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_ROUND) * SEGMENT_ROUND


def replay(requests: Iterable[tuple[int, int]]) -> Reserved:
    """Peaks of an empty allocator that serves `requests`: (block, bytes), bytes > 0 to make the block, negative to free it.

    Raises ValueError where a block is made twice, freed without being there, or asked for with 0 bytes.
    """
    allocator = CachingAllocator()
    for block, nbytes in requests:
        if nbytes > 0:
            allocator.make(block, nbytes)
        elif nbytes < 0:
            allocator.free(block)
        else:
            raise ValueError(f"requests must not ask for 0 bytes, as block {block} does")
    return allocator.peaks()


@dataclass(slots=True, eq=False)
class _Block:
    """A stretch of a segment. Address and size in bytes; neighbours in the same segment."""

    address: int
    size: int
    small: bool
    before: _Block | None = None
    after: _Block | None = None
    used: bool = False


class CachingAllocator:
    """Serves requests one by one; segments are never given back, as while a card has room."""

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self.requested = 0
        self._peak_allocated = 0
        self._peak_requested = 0
        self._blocks: dict[int, tuple[_Block, int]] = {}
        # Free blocks by size, then address, per pool: the order in which a best fit is looked for.
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, _Block] = {}
        self._end = 0

    def make(self, name: int, nbytes: int) -> None:
        """The smallest free block that is large enough, at the lowest address; else a new segment. What is left over becomes a
        free block of its own: in small segments from 512 bytes on, in large ones only above 1 MiB (should_split).

        Raises ValueError if `name` is in use or `nbytes` is not positive."""
        if name in self._blocks:
            raise ValueError(f"name {name} is in use already")
        if nbytes <= 0:
            raise ValueError(f"nbytes must be positive, not {nbytes}")
        size = rounded(nbytes)
        block = self._best_fit(size) or self._new_segment(size)
        left = block.size - size
        if left >= MIN_BLOCK if block.small else left > SMALL_REQUEST:
            self._split(block, size)
        block.used = True
        self._blocks[name] = (block, nbytes)
        self.allocated += block.size
        self.requested += nbytes
        self._peak_allocated = max(self._peak_allocated, self.allocated)
        self._peak_requested = max(self._peak_requested, self.requested)

    def free(self, name: int) -> None:
        """Joins the block with free neighbours. Raises ValueError if `name` is not in use."""
        if name not in self._blocks:
            raise ValueError(f"name {name} is not in use")
        block, nbytes = self._blocks.pop(name)
        self.allocated -= block.size
        self.requested -= nbytes
        block.used = False
        before, after = block.before, block.after
        if before is not None and not before.used:
            self._take(before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and not after.used:
            self._take(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        self._offer(block)

    def peaks(self) -> Reserved:
        return Reserved(self._peak_allocated, self.reserved, self._peak_requested)

    def _best_fit(self, size: int) -> _Block | None:
        pool = self._free[size <= SMALL_REQUEST]
        index = bisect_left(pool, (size, 0))
        return self._take(self._at[pool[index][1]]) if index < len(pool) else None

    def _new_segment(self, size: int) -> _Block:
        taken = segment_bytes(size)
        block = _Block(self._end, taken, size <= SMALL_REQUEST)
        self._end += taken
        self.reserved += taken
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        self._offer(rest)

    def _offer(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.address))
        self._at[block.address] = block

    def _take(self, block: _Block) -> _Block:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._at[block.address]
        return block
