"""Looks at something again and again while a prompt runs. No thread is there when nothing runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

logger = logging.getLogger("vram_headroom")

INTERVAL_S: Final = 0.25
"""Between two looks: a look asks the driver once, about 50 microseconds."""


class Sampler:
    """Calls `look` every `interval` seconds between `start` and `stop`, on a thread of its own.

    `wait(event, seconds)` returns True once the event is set; a test replaces it to say when the time has come.
    """

    def __init__(
        self,
        look: Callable[[], None],
        interval: float = INTERVAL_S,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._look, self._interval, self._wait = look, interval, wait
        self._stop: threading.Event | None = None

    def start(self) -> None:
        """Begin, unless it has begun already."""
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), name="vram_headroom_sample", daemon=True).start()

    def stop(self) -> None:
        """End. The thread goes by itself and is not waited for."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _run(self, stop: threading.Event) -> None:
        while not self._wait(stop, self._interval):
            try:
                self._look()
            except Exception:
                logger.exception("the card can't be watched during this prompt")
                return
