"""What each node took at its most: the allocator's own peak, and samples of what the process holds on the card.

Nodes nest and overlap, and there is one peak counter: it is folded into every node that is open whenever it is reset.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, NamedTuple, Protocol

PROMPTS_KEPT: Final = 16
"""Prompts whose peaks are remembered."""

NODES_KEPT: Final = 2048
"""Nodes of one prompt: what a loop runs again and again must not grow without end."""


class Allocated(NamedTuple):
    """Bytes in tensors: now, and the most since the counter was reset."""

    current: int
    peak: int


class PeakCounter(Protocol):
    """An allocator's own count, shared with everybody in this process who reads or resets it."""

    def read(self) -> Allocated: ...
    def reset(self) -> None: ...


class NodePeak(NamedTuple):
    """What one run of one node took at its most, in bytes. None: nothing counts it here."""

    node_id: str
    class_type: str
    allocated: int | None
    """Peak of the allocator, everything that lay there before included."""
    lower_bound: bool
    """Somebody else reset the counter meanwhile, so it may have been more."""
    sampled: int | None
    """Most of what this process was seen to hold on the card; between two looks it may have been more."""
    failed: bool = False


class _Open:
    """A node that runs."""

    __slots__ = ("allocated", "class_type", "lower_bound", "node_id", "sampled")

    def __init__(self, node_id: str, class_type: str) -> None:
        self.node_id, self.class_type = node_id, class_type
        self.allocated: int | None = None
        self.lower_bound = False
        self.sampled: int | None = None


class PeakLedger:
    """Peaks by node. `end` and `fold` belong to the worker thread; `begin`, `drop` and `sample` to any."""

    def __init__(self, counter: PeakCounter | None = None, sampled_now: Callable[[], int | None] = lambda: None) -> None:
        """`counter`: of the card's allocator, None where it keeps none. `sampled_now`: bytes this process holds on the card."""
        self._counter = counter
        self._sampled_now = sampled_now
        self._open: dict[Hashable, _Open] = {}
        self._floor = 0
        """The highest peak seen since the last reset of ours: a lower one means that another hand has reset it."""
        self._prompts: OrderedDict[str, list[NodePeak]] = OrderedDict()
        self._prompt = ""
        # one hand at a time on the counter: a sample between a reset and what is noted of it would see a foreign hand
        self._lock = threading.Lock()

    def start_prompt(self, prompt_id: str) -> None:
        """Peaks from now on are this prompt's."""
        self._open = {}
        self._prompt = prompt_id
        self._prompts[prompt_id] = []
        self._prompts.move_to_end(prompt_id)
        while len(self._prompts) > PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        with self._lock:
            self._reset()

    def begin(self, span: Hashable, node_id: str, class_type: str) -> None:
        """A node has started, now or a while ago; told twice, it began once. What was allocated since the last one that is told
        of counts for it."""
        if span in self._open:
            return
        if self._open:
            self.fold()
        self._open[span] = _Open(node_id, class_type)

    def drop(self, span: Hashable) -> None:
        """Forget a node that runs no more."""
        self._open.pop(span, None)

    def end(self, span: Hashable, failed: bool = False) -> NodePeak | None:
        """A node has ended; None for one that never began."""
        found = self._open.get(span)
        if found is None:
            return None
        self.fold()
        self.sample()
        self.drop(span)
        peak = NodePeak(found.node_id, found.class_type, found.allocated, found.lower_bound, found.sampled, failed)
        kept = self._prompts.setdefault(self._prompt, [])
        if len(kept) < NODES_KEPT:
            kept.append(peak)
        return peak

    def fold(self) -> None:
        """Count the allocator's peak for every node that is open, and begin to count anew."""
        with self._lock:
            seen = self._look()
            if seen is not None:
                for node in tuple(self._open.values()):
                    node.allocated = max(node.allocated or 0, seen.peak)
                self._reset()

    def sample(self, held: int | None = None) -> None:
        """Count what this process holds on the card right now for every open node; `held`: as somebody just read it."""
        nodes = tuple(self._open.values())
        if not nodes:
            return
        with self._lock:
            self._look()
        held = self._sampled_now() if held is None else held
        if held is not None:
            for node in nodes:
                node.sampled = max(node.sampled or 0, held)

    def of(self, prompt_id: str) -> tuple[NodePeak, ...]:
        """Peaks of a prompt's nodes in the order they ended; none for one long gone."""
        return tuple(self._prompts.get(prompt_id, ()))

    def _look(self) -> Allocated | None:
        if self._counter is None:
            return None
        seen = self._counter.read()
        if seen.peak < self._floor:
            for node in tuple(self._open.values()):
                node.lower_bound = True
        self._floor = max(seen.peak, self._floor)
        return seen

    def _reset(self) -> None:
        if self._counter is None:
            return
        self._counter.reset()
        # a reset counter starts from what is allocated
        self._floor = self._counter.read().current
