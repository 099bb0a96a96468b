"""What recovery did and could not do, for a person to read: one entry for each retry, refusal, kept latent and surrender."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

logger = logging.getLogger("vram_headroom")

MOST_KEPT: Final = 500
"""A step ends after at most three retries and one surrender, so these are more than any prompt that people look at has."""

Kind = Literal["retry", "tiles", "smaller", "kept", "gave_up", "refused"]
"""retry: the same work once more; tiles: a decode or encode in tiles; smaller: cond and uncond in turn; kept: a latent was
saved; gave_up: nothing helped; refused: no retry, since state that can't be restored would make another picture."""


class Incident(NamedTuple):
    """One thing that came of an out-of-memory error."""

    prompt_id: str
    node_id: str
    kind: Kind
    attempt: int
    """Of the retries in a row, from 1; 0 where nothing was tried again."""
    taken_at: float
    """Seconds of the monitor's clock."""
    freed_bytes: int
    same_picture: bool
    """The work is done as it would have been without the error, to the last bit."""
    message: str
    """What happened and what to do, for a person."""
    file: str | None = None
    """Where a latent was kept."""


class IncidentLog:
    """The newest incidents of this process. Any thread."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        """Raises ValueError for room for less than one."""
        if most < 1:
            raise ValueError(f"a log of incidents holds at least one, not {most}")
        self._lock = threading.Lock()
        self._kept: deque[Incident] = deque(maxlen=most)
        self._watchers: tuple[Callable[[Incident], None], ...] = ()

    def record(self, incident: Incident) -> None:
        """Keep it and tell the watchers, on this thread. What they raise is logged: recovery goes on."""
        with self._lock:
            self._kept.append(incident)
        for watcher in self._watchers:
            try:
                watcher(incident)
            except Exception:
                logger.exception("an out-of-memory incident could not be passed on")

    def of(self, prompt_id: str) -> tuple[Incident, ...]:
        """Oldest first."""
        with self._lock:
            return tuple(incident for incident in self._kept if incident.prompt_id == prompt_id)

    def watch(self, watcher: Callable[[Incident], None]) -> None:
        """Tell `watcher` of every incident from now on."""
        self._watchers = (*self._watchers, watcher)
