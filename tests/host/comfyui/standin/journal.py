"""The ordered record of what happened: prompt hook, validation, loads, node start and end, websocket messages."""

import threading
from typing import Any, NamedTuple


class Entry(NamedTuple):
    number: int
    what: str
    data: dict[str, Any]
    thread: str


class Journal:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[Entry] = []

    def note(self, what: str, **data: Any) -> None:
        with self._lock:
            self._entries.append(Entry(len(self._entries), what, data, threading.current_thread().name))

    def since(self, number: int = 0) -> list[Entry]:
        with self._lock:
            return self._entries[number:]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


journal = Journal()
