"""Runs out of memory where a test asks for it: inside of a forward, before or after the n-th call of something."""

import threading
from collections import Counter
from typing import NamedTuple

import torch


class Fault(NamedTuple):
    where: str
    """attention, text encoder, vision, decode, decode tile, encode, encode tile."""
    number: int
    """Of its calls, from 0; every call fails that comes to this number."""
    times: int = 1
    after: bool = False
    """When its work is done already, and whatever it changes is changed."""


class Faults:
    """Asked for on any thread, met on the worker's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: list[Fault] = []
        self._done: Counter[str] = Counter()
        self.raised = 0

    def ask(self, *faults: Fault) -> None:
        """These and no others; counting starts anew."""
        with self._lock:
            self._asked = list(faults)
            self._done.clear()
            self.raised = 0

    def count(self, where: str) -> int:
        """Calls that came to their end."""
        return self._done[where]

    def reach(self, where: str, after: bool = False) -> None:
        with self._lock:
            number = self._done[where]
            for index, fault in enumerate(self._asked):
                if (fault.where, fault.number, fault.after) == (where, number, after) and fault.times > 0:
                    self._asked[index] = fault._replace(times=fault.times - 1)
                    self.raised += 1
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate 20.00 MiB (asked for, {where} {number})"
                    )
            if after:
                self._done[where] += 1


faults = Faults()
