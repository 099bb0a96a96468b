"""Stops the worker at a chosen node and step, so that a test can look around in the middle of a run; and paces a step."""

import threading
from collections.abc import Callable
from typing import NamedTuple


class Hold(NamedTuple):
    node_id: str
    step: int | None
    """None: at the start of the node. k: in the first forward of step k (0-based) of its sampling."""


class Holds:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: Hold | None = None
        self._held: Hold | None = None

    def ask(self, hold: Hold) -> None:
        with self._changed:
            self._wanted = hold
            self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._wanted = None
            self._changed.notify_all()

    def wait_until_held(self, timeout: float) -> Hold | None:
        """What the worker waits at; None when it did not get there in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._held is not None, timeout)
            return self._held

    def interrupted(self) -> None:
        """Wake whoever paces or is held, so that an interrupt is seen at once."""
        with self._changed:
            self._changed.notify_all()

    def reach(self, node_id: str, step: int | None, stop: Callable[[], bool]) -> None:
        """Called by the worker; returns when nobody holds it here, or `stop` says that it is interrupted."""
        here = Hold(node_id, step)
        with self._changed:
            if self._wanted != here:
                return
            self._held = here
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted != here or stop())
            self._held = None
            self._wanted = None if self._wanted == here else self._wanted
            self._changed.notify_all()

    def pace(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Let `seconds` pass, for people who watch; an interrupt ends it."""
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(stop, seconds)


holds = Holds()
