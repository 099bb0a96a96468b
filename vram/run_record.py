"""What the prompt that runs, or the last one, did to the card: what this process held over time, and how it ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

RunState = Literal["running", "done", "failed", "interrupted"]

MOST_SAMPLES: Final = 600
"""Kept of a run: one for each two pixels of a wide timeline."""

MOST_MARKS: Final = 256
"""Kept of a run; a graph has a dozen phases, and a loop that runs one again and again must not grow without end."""

MOST_FRESH: Final = 256
"""Kept as they came for those who follow: four a second are taken, and one at the end of each node that is looked at."""


class Sample(NamedTuple):
    """What this process held on the card at one moment."""

    at: float
    """Seconds since the prompt's start."""
    bytes: int


class Mark(NamedTuple):
    """From when on a node was computing."""

    node_id: str
    at: float
    """Seconds since the prompt's start."""


class RunSeen(NamedTuple):
    """A run as it is at one moment."""

    prompt_id: str
    state: RunState
    at: float
    """Seconds since its start; of one that has ended, how long it took."""
    started: float
    """Seconds of the record's clock."""
    failed_node: str | None
    """Where it failed or was stopped."""
    taken: int
    """Samples taken so far: what `RunRecord.fresh` is asked with."""
    marks: tuple[Mark, ...] = ()
    """Of the nodes of its plan's phases that have started, in order."""


class _Run:
    def __init__(self, prompt_id: str, started: float) -> None:
        self.prompt_id, self.started = prompt_id, started
        self.state: RunState = "running"
        self.ended: float | None = None
        self.failed_node: str | None = None
        self.taken = 0
        self.marks: list[Mark] = []
        self.kept: list[Sample] = []
        self.each, self.in_last = 1, 0
        """Samples that one of `kept` stands for, the highest of them; and how many the last one does so far."""
        self.fresh: deque[Sample] = deque(maxlen=MOST_FRESH)

    def seen(self, now: float) -> RunSeen:
        at = (now if self.ended is None else self.ended) - self.started
        return RunSeen(self.prompt_id, self.state, at, self.started, self.failed_node, self.taken, tuple(self.marks))

    def add(self, sample: Sample, most: int) -> None:
        self.taken += 1
        self.fresh.append(sample)
        if self.kept and self.in_last < self.each:
            self.kept[-1] = _higher(self.kept[-1], sample)
            self.in_last += 1
            return
        self.kept.append(sample)
        self.in_last = 1
        if len(self.kept) > most:
            if len(self.kept) % 2 == 0:
                self.in_last += self.each
            halves = (self.kept[index : index + 2] for index in range(0, len(self.kept), 2))
            self.kept = [_higher(*pair) if len(pair) == 2 else pair[0] for pair in halves]
            self.each *= 2


def _higher(one: Sample, other: Sample) -> Sample:
    return other if other.bytes > one.bytes else one


class RunRecord:
    """The newest run and the one before it. Any thread."""

    def __init__(self, clock: Callable[[], float], most: int = MOST_SAMPLES) -> None:
        """`clock` counts seconds. Raises ValueError for room for less than two samples."""
        if most < 2:
            raise ValueError(f"a run keeps at least two samples, not {most}")
        self._clock = clock
        self._most = most
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._before: _Run | None = None
        self._tell: Callable[[], None] = lambda: None

    def on_change(self, call: Callable[[], None]) -> None:
        """Call this whenever a run has started or ended, on the thread that says so."""
        self._tell = call

    def start(self, prompt_id: str) -> None:
        """A prompt starts: what is sampled from now on is its own."""
        with self._lock:
            self._before, self._run = self._run, _Run(prompt_id, self._clock())
        self._tell()

    def sample(self, nbytes: int) -> None:
        """What this process holds right now. Left out when nothing runs."""
        with self._lock:
            run = self._run
            if run is not None and run.ended is None:
                run.add(Sample(round(self._clock() - run.started, 3), nbytes), self._most)

    def mark(self, node_id: str, since: float) -> None:
        """This node has started at `since`, by the clock of this record, and it computes a phase of the plan."""
        with self._lock:
            run = self._run
            if run is not None and run.ended is None and len(run.marks) < MOST_MARKS:
                run.marks.append(Mark(node_id, round(max(0.0, since - run.started), 3)))

    def fail(self, node_id: str) -> None:
        """This node raised an error or was stopped, and the prompt with it."""
        with self._lock:
            if self._run is not None:
                self._run.failed_node = node_id

    def end(self, state: RunState) -> None:
        """The prompt has ended so."""
        with self._lock:
            if self._run is not None and self._run.ended is None:
                self._run.state, self._run.ended = state, self._clock()
        self._tell()

    def seen(self) -> RunSeen | None:
        """The newest run; None before the first."""
        with self._lock:
            return self._run.seen(self._clock()) if self._run is not None else None

    def before(self) -> RunSeen | None:
        """The run before the newest."""
        with self._lock:
            return self._before.seen(self._clock()) if self._before is not None else None

    def samples(self, prompt_id: str) -> tuple[Sample, ...]:
        """The newest run's from its start: of each few, where there were too many, the highest. None of another run's."""
        with self._lock:
            return tuple(self._run.kept) if self._run is not None and self._run.prompt_id == prompt_id else ()

    def fresh(self, prompt_id: str, after: int) -> tuple[Sample, ...]:
        """Those taken of this run after the first `after`, as they came."""
        with self._lock:
            run = next((run for run in (self._run, self._before) if run is not None and run.prompt_id == prompt_id), None)
            new = run.taken - after if run is not None else 0
            return tuple(run.fresh)[-new:] if run is not None and new > 0 else ()
