"""Plans kept for later: chains of graphs asked about before, and plans by the prompt they were made for. Both bounded."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, Generic, TypeVar

from ..estimate.checkpoint import Checkpoint
from .types import Chain, Library, Media, MediaSize, MissingFileError, Plan, UnreadableFileError

CHAINS_KEPT: Final = 32
PLANS_KEPT: Final = 128
"""A chain of 1,000 nodes takes about 0.3 MB and a plan 0.1 MB: what is kept stays below 20 MB (tests/bench_plan.py)."""

Kept = TypeVar("Kept")


def content_key(prompt: object, *beside: Hashable) -> str:
    """Equal for prompts of equal content and equal `beside`. Raises ValueError for what is no JSON."""
    try:
        text = json.dumps(prompt, separators=(",", ":"))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"prompt is no JSON: {error}") from None
    return hashlib.blake2b(text.encode() + repr(beside).encode(), digest_size=16).hexdigest()


class Bounded(Generic[Kept]):
    """The last values asked for or put, by key. Threads may share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = Lock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def get(self, key: str) -> Kept | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, value: Kept) -> None:
        with self._lock:
            self._kept[key] = value
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)

    def pop(self, key: str) -> Kept | None:
        with self._lock:
            return self._kept.pop(key, None)

    def __len__(self) -> int:
        return len(self._kept)


Stamp = tuple[int, int] | None
"""Size and time of change of a file; None where there is none."""


def stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns)


@dataclass(slots=True)
class Reads:
    """Every file that was looked at while a chain was built, so that a change of any can be seen later."""

    library: Library
    media: Media
    media_path: Callable[[str], str | None]
    stamps: dict[str, Stamp] = field(default_factory=dict)
    missing: set[tuple[str, str]] = field(default_factory=set)
    """(folder, name) that no file was found for: there may be one the next time."""

    def header(self, folder: str, name: str) -> Checkpoint:
        try:
            found = self.library(folder, name)
        except UnreadableFileError as error:
            self.stamps[error.path] = stamp(error.path)
            raise
        except MissingFileError:
            self.missing.add((folder, name))
            raise
        self.stamps[found.path] = stamp(found.path)
        return found

    def size(self, name: str) -> MediaSize | None:
        path = self.media_path(name)
        if path is not None:
            self.stamps[path] = stamp(path)
        return self.media(name)


@dataclass(frozen=True, slots=True)
class _KeptChain:
    chain: Chain
    stamps: tuple[tuple[str, Stamp], ...]
    missing: frozenset[tuple[str, str]]


class ChainCache:
    """Chains by content, given again as long as no file they looked at has changed, come or gone."""

    def __init__(self, find: Callable[[str, str], str | None], size: int = CHAINS_KEPT) -> None:
        """`find` gives the path of a model file by folder and name, or None."""
        self._find = find
        self._chains: Bounded[_KeptChain] = Bounded(size)

    def get(self, key: str) -> Chain | None:
        kept = self._chains.get(key)
        if kept is None:
            return None
        unchanged = all(stamp(path) == was for path, was in kept.stamps)
        return kept.chain if unchanged and not any(self._find(*name) for name in kept.missing) else None

    def put(self, key: str, chain: Chain, reads: Reads) -> None:
        self._chains.put(key, _KeptChain(chain, tuple(reads.stamps.items()), frozenset(reads.missing)))

    def __len__(self) -> int:
        return len(self._chains)


class PlanStore(Bounded[Plan]):
    """Plans by the id of the prompt they were made for."""

    def __init__(self, size: int = PLANS_KEPT) -> None:
        super().__init__(size)
