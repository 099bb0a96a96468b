"""What the pack costs a prompt: prompts of trivial nodes with the pack and without it, turn by turn.

The machine may be busy with other things, and both sides then suffer alike: what is compared is one prompt with the prompt run
just before or after it on the other side, and of those differences the median counts. The lower quartiles of either side are
compared as well, since they are disturbed least. Which side goes first is drawn: a fixed pattern falls in step with Python's
garbage collector, and then the same host differs from itself by 1 %.
"""

import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from host.lab import Prompt, node
from host.process import HostProcess

T = TypeVar("T")

STOPWATCH: Final = Path(__file__).parent / "host" / "packs" / "stopwatch.py"
REPORT: Final = Path(__file__).parent.parent / "docs" / "overhead.md"
INSTRUCTIONS: Final = "## In instructions, the stand-in"
"""The last section of the report, which has a benchmark of its own."""
NODES: Final = 200
ROW: Final = 20
"""Nodes of the longest way through the graph; a graph for two experts has about as many."""

Clock = Literal["wall", "worker", "process"]
"""Time that passed; time that the worker thread spent on a core; time that all threads of the process spent there."""

Ask = Callable[[str, Any], Any]
"""GET a path of a host, or POST a body to it; returns the parsed answer."""


CORES: Final = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
"""That we may use; empty where the system does not tell."""


@contextmanager
def on_one_core(host: AbstractContextManager[T]) -> Iterator[T]:
    """All threads of a host that starts as its block is entered stay on one of CORES, and ours on the others."""
    allowed, core = os.sched_getaffinity(0), max(CORES)
    os.sched_setaffinity(0, {core})
    try:
        with host as started:
            os.sched_setaffinity(0, CORES - {core} or CORES)
            yield started
    finally:
        os.sched_setaffinity(0, allowed)


def trivial_prompt(start: int, nodes: int = NODES) -> Prompt:
    """Rows of nodes that add one. Another `start`, and nothing of it is cached: at least `nodes` apart for that."""
    prompt: Prompt = {}
    for number in range(nodes):
        first, last = number % ROW == 0, number % ROW == ROW - 1 or number == nodes - 1
        value = start + number if first else [str(number - 1), 0]
        prompt[str(number)] = node("StopwatchEnd" if last else "StopwatchStep", value=value)
    return prompt


class Difference(NamedTuple):
    """Of pairs of prompts, in seconds and in shares of a prompt without the pack."""

    without: float
    """Median of the prompts without the pack, s."""
    added: float
    """Median of the differences, s."""
    low: float
    high: float
    """Between these the median of the differences lies with 95 % confidence, s (bootstrap)."""
    calm_without: float
    calm_added: float
    """As `without` and `added`, of the quarter of the prompts that was disturbed least: other work only ever adds time."""

    @property
    def calm_share(self) -> float:
        return self.calm_added / self.calm_without

    @property
    def share(self) -> float:
        return self.added / self.without


def difference(pairs: Sequence[tuple[float, float]], resamples: int = 2000) -> Difference:
    """Of pairs (with the pack, without it)."""
    differences = [ours - theirs for ours, theirs in pairs]
    dice = random.Random(7)
    medians = sorted(statistics.median(dice.choices(differences, k=len(differences))) for _ in range(resamples))
    calm = [statistics.quantiles(side, n=4)[0] for side in zip(*pairs, strict=True)]
    return Difference(
        without=statistics.median(theirs for _, theirs in pairs),
        added=statistics.median(differences),
        low=medians[resamples * 25 // 1000],
        high=medians[resamples * 975 // 1000],
        calm_without=calm[1],
        calm_added=calm[0] - calm[1],
    )


def asking(host: HostProcess) -> Ask:
    """Of the stand-in. Raises AssertionError where it refuses."""

    def ask(path: str, body: Any) -> Any:
        if body is not None:
            # its journal would grow by thousands of entries, and Python's collector with it
            host.post("/_host/log/clear")
            host.post("/history", {"clear": True})
        answer = host.get(path) if body is None else host.post(path, body)
        assert answer.status == 200, answer.body
        return answer.body

    return ask


def run_once(ask: Ask, prompt: Prompt) -> dict[Clock, float]:
    """Seconds that one prompt took, by each clock."""
    queued = ask("/prompt", {"prompt": prompt, "client_id": "overhead"})
    return ask(f"/stopwatch/{queued['prompt_id']}", None)


Pairs = dict[Clock, list[tuple[float, float]]]
"""Seconds (with the pack, without it) of each pair, by each clock."""


def run_pairs(ours: Ask, theirs: Ask, pairs: int, warm_up: int = 5, nodes: int = NODES) -> Pairs:
    """In two hosts, or in one that is told each time: no two prompts share a value."""
    dice = random.Random(pairs)
    found: Pairs = {"wall": [], "worker": [], "process": []}
    for pair in range(-warm_up, pairs):
        start = (pair + warm_up) * nodes * 4
        sides = [(ours, start), (theirs, start + nodes * 2)]
        dice.shuffle(sides)
        spent = {ask: run_once(ask, trivial_prompt(begin, nodes)) for ask, begin in sides}
        if pair >= 0:
            for clock, values in found.items():
                values.append((spent[ours][clock], spent[theirs][clock]))
    return found


def switched(ask: Ask, pairs: int, warm_up: int = 5, against_itself: bool = False) -> Pairs:
    """In one host, with the pack's check of what is posted and its wrappers in place, or not; `against_itself`: without them
    on either side, which says how much of a difference is none."""

    def with_pack(on: bool) -> Ask:
        def told(path: str, body: Any) -> Any:
            if body is not None:
                ask("/stopwatch/pack", {"on": on})
            return ask(path, body)

        return told

    return run_pairs(with_pack(not against_itself), with_pack(False), pairs, warm_up)
