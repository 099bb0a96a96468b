"""comfy-aimdo's books on the simulated card: which 32 MiB pages of which model are on it, and which leave under pressure.

Own code that follows the native library's rules. `vbar.c`, `alloc.c`, `buf.c`, `plat.h` and `control.c` with a line stand for
src/model-vbar.c, src/pyt-cu-plug-alloc-async.c, src/vrambuf.c, src/plat.h and src/control.c of Comfy-Org/comfy-aimdo at commit
ce3c59e (2 July 2026, v0.4.10 and 8 commits), the newest source that could be read. The debug lines in the 0.4.13 library say
that its vbar.c is that one, moved by at most two lines, but for a clamp that `prioritize` may set; ComfyUI 0.33 sets none.

Not simulated: that clamp (0.4.13), page-out callbacks and malloc graphs (0.6.0), cards that share the computer's RAM, NVML's
and Windows' own reading of memory pressure, fragmentation, and blocks that torch's allocator keeps after a tensor has died.
Like the library, it has no locks: it belongs to the worker thread (reference for that: vbar.c has none).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch

MIB = 2**20
PAGE_BYTES = 32 * MIB
"""vbar.c:3"""
POLLED_HEADROOM = 256 * MIB
"""Free memory below which pages leave, as the driver reports it: plat.h:147, control.c:159. Nothing lowers it."""
POLL_MS = 2000
"""The driver is asked for free memory once in so many milliseconds: control.c:130."""
BUFFER_CHUNK = 16 * MIB
"""buf.c:6"""
CUDA_PAGE = 2 * MIB
"""plat.h:106"""


class PagesOfAModelError(RuntimeError):
    """What the library answers with VBAR_FAULT_ERROR (vbar.c:336); `code` is 2."""

    code = 2


class Booking(Protocol):
    nbytes: int
    owner: str


class Card(Protocol):
    """What these books need of a card: vram/device.py's SimulatedCard."""

    @property
    def total_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...
    def allocate(self, nbytes: int, owner: str) -> Any: ...
    def resize(self, booking: Any, nbytes: int) -> None: ...
    def release(self, booking: Any) -> None: ...


def pages_up(nbytes: int) -> int:
    """vbar.c:6"""
    return -(-nbytes // PAGE_BYTES)


class Page:
    __slots__ = ("pins", "resident", "serial")

    def __init__(self) -> None:
        self.resident = False
        self.pins = 0
        self.serial = 0
        """Counts how often the page came: a layer whose page was away and came back is seen to need its bytes again."""


class Vbar:
    """One model's pages; page 0 is the most important one. Changed only through CardPages."""

    def __init__(self, nr_pages: int, label: str) -> None:
        self.pages = [Page() for _ in range(nr_pages)]
        self.watermark = nr_pages
        """Pages from here up are not given out; a fault there streams. Falls when pages are evicted."""
        self.watermark_limit = 0
        """Eviction stops here."""
        self.resident = 0
        self.label = label
        """Whose pages they are, in the card's books. (Of this simulation: the library knows no names.)"""
        self.booking: Any = None

    @property
    def resident_bytes(self) -> int:
        """vbar.c:476: whole pages, so a model may be larger here than its weights are."""
        return self.resident * PAGE_BYTES

    def residency(self) -> list[int]:
        """Per page 1 (resident) + 2 (pinned): vbar.c:502."""
        return [(1 if page.resident else 0) | (2 if page.pins else 0) for page in self.pages]


class Buffer:
    """Where layers that got no page are copied to, anew in each forward."""

    def __init__(self, max_bytes: int, label: str) -> None:
        self.max_bytes = -(-max_bytes // CUDA_PAGE) * CUDA_PAGE
        self.allocated = 0
        self.label = label
        self.booking: Any = None


def accounted(nbytes: int) -> int:
    """What the library counts for an allocation of torch's: alloc.c:87-106."""
    if nbytes <= 1024:
        return 1024
    return -(-nbytes // CUDA_PAGE) * CUDA_PAGE if nbytes > CUDA_PAGE // 2 else nbytes


class CardPages:
    """Everything of this process on one card: models' pages, buffers, and torch's own allocations, which are hooked.

    `allocate`, `resize` and `release` are those of the card, hooked: what takes memory beside the pages goes through them.
    `clock` gives milliseconds; by default each look is a poll interval after the one before, so that the driver's reading
    is never old.
    """

    def __init__(self, card: Card, extra_headroom: int = 0, clock: Callable[[], int] | None = None) -> None:
        self.card = card
        self.capacity = card.total_bytes
        self.extra_headroom = extra_headroom
        """Bytes beyond every other headroom, per card: plat.h:160; ComfyUI's --vram-headroom (0.33, main.py:305)."""
        self.simple_headroom = POLLED_HEADROOM
        """Of the capacity, whatever the driver says: control.c:54; ComfyUI's --reserve-vram (0.33, main.py:99)."""
        self.total_usage = 0
        """What the library answers to get_total_vram_usage: control.c:185."""
        ticks = itertools.count(POLL_MS, POLL_MS)
        self._clock = clock or (lambda: next(ticks))
        self._checked_at = 0
        self._usage_at_check = 0
        self._deficit_at_check = 0
        self._order: list[Vbar] = []
        self._torch: dict[int, int] = {}

    # What leaves, and when.

    def deficit(self, nbytes: int = 0) -> int:
        """Bytes that must leave before `nbytes` more come, at most 0 when none must: plat.h:150-167, control.c:125-166."""
        now = self._clock()
        if now - self._checked_at >= POLL_MS:
            self._checked_at = now
            self._usage_at_check = self.total_usage
            self._deficit_at_check = POLLED_HEADROOM - self.card.free_bytes
        simple = self.total_usage + nbytes + self.simple_headroom - self.capacity
        polled = self._deficit_at_check + self.total_usage - self._usage_at_check + nbytes
        return max(simple, polled) + self.extra_headroom

    def evict(self, nbytes: int) -> int:
        """Let pages go until `nbytes` have: from the least important model up, each from its top down. Pinned pages stay, but
        the watermark falls below them as well. Returns the pages that are still wanted. vbar.c:113-144."""
        wanted = pages_up(nbytes) if nbytes > 0 else 0
        for vbar in self._order:
            while wanted and vbar.watermark > vbar.watermark_limit:
                if self._let_go(vbar, vbar.watermark - 1):
                    wanted -= 1
                vbar.watermark -= 1
        return wanted

    def _evict_for(self, vbar: Vbar, target: int, surplus: int) -> None:
        """Make room for the absent pages of `vbar` below `target`, from every model in the order of importance, itself
        included: a page that is missing may cost less important ones their place, never more important ones. vbar.c:146-190."""

        def absent(cursor: int) -> int:
            while cursor < vbar.watermark and vbar.pages[cursor].resident:
                cursor += 1
            return cursor

        def spend(cursor: int, surplus: int) -> tuple[int, int]:
            while surplus >= PAGE_BYTES and cursor < target and cursor < vbar.watermark:
                surplus -= PAGE_BYTES
                cursor = absent(cursor + 1)
            return cursor, surplus

        cursor, surplus = spend(absent(0), surplus)
        for other in self._order:
            while ((cursor < target and cursor < vbar.watermark) or surplus < 0) and other.watermark > other.watermark_limit:
                if self._let_go(other, other.watermark - 1):
                    cursor, surplus = spend(cursor, surplus + PAGE_BYTES)
                other.watermark -= 1

    def _let_go(self, vbar: Vbar, number: int, pinned_too: bool = False) -> bool:
        """vbar.c:94-111"""
        page = vbar.pages[number]
        gone = page.resident and (pinned_too or page.pins == 0)
        if gone:
            page.resident = False
            vbar.resident -= 1
            self.total_usage -= PAGE_BYTES
            self._book(vbar, vbar.resident_bytes)
        if pinned_too:
            page.pins = 0
        return gone

    # One model's pages.

    @property
    def order(self) -> tuple[Vbar, ...]:
        """The least important model first: pages leave in this order."""
        return tuple(self._order)

    @property
    def resident_bytes(self) -> int:
        """vbar.c:47-92: what vbars_analyze adds up."""
        return sum(vbar.resident_bytes for vbar in self._order)

    def reserve(self, nbytes: int, label: str = "VBAR") -> Vbar:
        """Addresses for a model, nothing on the card; no more pages than the card has. It is the most important one from now
        on. vbar.c:212-248."""
        vbar = Vbar(min(pages_up(nbytes), self.capacity // PAGE_BYTES), label)
        self._order.append(vbar)
        return vbar

    def forget(self, vbar: Vbar) -> None:
        """Pins or not. vbar.c:451-468."""
        for number in range(len(vbar.pages)):
            self._let_go(vbar, number, pinned_too=True)
        self._order.remove(vbar)

    def prioritize(self, vbar: Vbar) -> None:
        """The most important one, with every page allowed to come back. vbar.c:296-310."""
        self._order.remove(vbar)
        self._order.append(vbar)
        vbar.watermark = len(vbar.pages)

    def deprioritize(self, vbar: Vbar) -> None:
        """The first to lose pages; it loses none now. vbar.c:313-325."""
        self._order.remove(vbar)
        self._order.insert(0, vbar)

    def set_watermark_limit(self, vbar: Vbar, nbytes: int) -> None:
        """vbar.c:257"""
        vbar.watermark_limit = pages_up(nbytes)

    def reset_watermark_limits(self) -> None:
        """vbar.c:290-292"""
        for vbar in self._order:
            vbar.watermark_limit = 0

    def set_watermark(self, vbar: Vbar, nbytes: int) -> None:
        """vbar.c:261-282"""
        watermark = min(pages_up(nbytes), len(vbar.pages))
        for number in range(watermark, vbar.watermark):
            self._let_go(vbar, number)
        vbar.watermark = watermark

    def free(self, vbar: Vbar, nbytes: int) -> int:
        """Take pages from one model, from its top down to its limit; returns the bytes that went. vbar.c:507-532."""
        wanted, gone = pages_up(nbytes), 0
        while wanted and vbar.watermark > vbar.watermark_limit:
            if self._let_go(vbar, vbar.watermark - 1):
                wanted -= 1
                gone += 1
            vbar.watermark -= 1
        return gone * PAGE_BYTES

    def fault(self, vbar: Vbar, offset: int, nbytes: int) -> tuple[int, ...] | None:
        """Bring the pages of one layer onto the card and pin them; the serials of these pages, or None where the layer has to
        be streamed instead. Raises PagesOfAModelError. vbar.c:339-420."""
        first, end = offset // PAGE_BYTES, pages_up(offset + nbytes)
        self.evict(self.deficit())
        if end > vbar.watermark:
            return None
        room_made = False
        for number in range(first, end):
            page = vbar.pages[number]
            if page.resident:
                continue
            if not room_made:
                missing = (end - number) * PAGE_BYTES
                self._evict_for(vbar, end, self.capacity - (self.total_usage + missing + self.simple_headroom))
                room_made = True
                if end > vbar.watermark:
                    return None
            if self.deficit(PAGE_BYTES) > 0 or not self._map(vbar, page):
                self.evict(PAGE_BYTES)
                if end > vbar.watermark:
                    return None
                if not self._map(vbar, page):
                    raise PagesOfAModelError("VRAM Allocation failed")
            page.serial += 1
        for number in range(first, end):
            vbar.pages[number].pins += 1
        return tuple(page.serial for page in vbar.pages[first:end])

    def unpin(self, vbar: Vbar, offset: int, nbytes: int) -> None:
        """The layer was used; a page above the watermark goes with its last pin. vbar.c:423-448."""
        for number in range(offset // PAGE_BYTES, min(pages_up(offset + nbytes), len(vbar.pages))):
            page = vbar.pages[number]
            page.pins = max(0, page.pins - 1)
            if number >= vbar.watermark:
                self._let_go(vbar, number)

    def _map(self, vbar: Vbar, page: Page) -> bool:
        """plat.h:182-220"""
        try:
            self._book(vbar, vbar.resident_bytes + PAGE_BYTES)
        except torch.OutOfMemoryError:
            return False
        page.resident = True
        vbar.resident += 1
        self.total_usage += PAGE_BYTES
        return True

    def _book(self, holder: Vbar | Buffer, nbytes: int) -> None:
        if nbytes == 0:
            self.card.release(holder.booking)
            holder.booking = None
        elif holder.booking is None:
            holder.booking = self.card.allocate(nbytes, holder.label)
        else:
            self.card.resize(holder.booking, nbytes)

    # Buffers.

    def grow(self, buffer: Buffer, nbytes: int) -> bool:
        """To at least `nbytes`, in whole chunks; False when it does not fit. buf.c:52-101."""
        if nbytes > buffer.max_bytes:
            return False
        goal = min(-(-nbytes // BUFFER_CHUNK) * BUFFER_CHUNK, buffer.max_bytes)
        if nbytes > buffer.allocated:
            self.evict(self.deficit(goal - buffer.allocated))
        while nbytes > buffer.allocated and buffer.allocated < goal:
            if not self._chunk(buffer, goal):
                self.evict(BUFFER_CHUNK)
                if not self._chunk(buffer, goal):
                    return False
        return True

    def _chunk(self, buffer: Buffer, goal: int) -> bool:
        more = min(BUFFER_CHUNK, goal - buffer.allocated)
        try:
            self._book(buffer, buffer.allocated + more)
        except torch.OutOfMemoryError:
            return False
        buffer.allocated += more
        self.total_usage += more
        return True

    def destroy(self, buffer: Buffer) -> None:
        """buf.c:114-144"""
        if buffer.booking is not None:
            self._book(buffer, 0)
        self.total_usage -= buffer.allocated
        buffer.allocated = 0

    # torch's own allocations, hooked.

    def allocate(self, nbytes: int, owner: str) -> Any:
        """Pages leave before torch is refused anything: alloc.c:209-244. Raises torch.OutOfMemoryError as the card does."""
        self.evict(self.deficit(nbytes))
        try:
            booking = self.card.allocate(nbytes, owner)
        except torch.OutOfMemoryError:
            self.evict(nbytes)
            booking = self.card.allocate(nbytes, owner)
        self._torch[id(booking)] = accounted(nbytes)
        self.total_usage += accounted(nbytes)
        return booking

    def resize(self, booking: Any, nbytes: int) -> None:
        """Some of a model's tensors come or go, under one booking."""
        more = nbytes - booking.nbytes
        if more > 0:
            self.evict(self.deficit(more))
        try:
            self.card.resize(booking, nbytes)
        except torch.OutOfMemoryError:
            self.evict(more)
            self.card.resize(booking, nbytes)
        self.total_usage += accounted(nbytes) - self._torch[id(booking)]
        self._torch[id(booking)] = accounted(nbytes)

    def release(self, booking: Any) -> None:
        """alloc.c:246-269"""
        self.card.release(booking)
        self.total_usage -= self._torch.pop(id(booking))
