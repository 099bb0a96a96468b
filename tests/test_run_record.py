"""What is kept of a run: samples, thinned without losing the peak, and how it ended."""

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram.run_record import MOST_SAMPLES, RunRecord, RunState, Sample


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record_of(sizes: list[int], most: int = MOST_SAMPLES) -> RunRecord:
    """One sample a second."""
    clock = Clock()
    record = RunRecord(clock, most)
    record.start("p")
    for size in sizes:
        clock.now += 1.0
        record.sample(size)
    return record


def test_a_sample_has_the_seconds_since_the_start_and_the_bytes() -> None:
    record = record_of([5, 7])
    assert record.samples("p") == ((1.0, 5), (2.0, 7))
    assert record.samples("another") == ()


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=400), st.integers(2, 20))
def test_thinning_keeps_the_peak_the_order_and_the_bound(sizes: list[int], most: int) -> None:
    kept = record_of(sizes, most).samples("p")
    assert len(kept) <= most
    assert max(kept, key=lambda one: one.bytes).bytes == max(sizes)
    assert list(kept) == sorted(kept, key=lambda one: one.at)
    assert all(sizes[round(one.at) - 1] == one.bytes for one in kept)
    if len(sizes) > most:
        assert 2 * len(kept) >= most, "no more is lost than has to be"


def test_a_long_run_is_thinned_evenly() -> None:
    kept = record_of(list(range(10_000))).samples("p")
    gaps = [later.at - earlier.at for earlier, later in pairwise(kept)]
    # each stands for as many as the others, but the last, which is not full yet
    assert set(gaps[:-1]) == {32.0}
    assert len(kept) == 313


def test_who_follows_gets_each_sample_once() -> None:
    record = record_of([1, 2, 3])
    seen = record.seen()
    assert seen is not None
    assert record.fresh("p", 1) == (Sample(2.0, 2), Sample(3.0, 3))
    assert record.fresh("p", seen.taken) == ()
    record.sample(4)
    assert [one.bytes for one in record.fresh("p", seen.taken)] == [4]


@pytest.mark.parametrize("state", get_args(RunState)[1:])
def test_a_run_that_has_ended_stays_until_the_next_and_takes_no_sample(state: RunState) -> None:
    clock, told = Clock(), list[str]()
    record = RunRecord(clock)
    record.on_change(lambda: told.append("changed"))
    assert record.seen() is None
    record.start("a")
    clock.now += 3.0
    record.fail("8")
    record.end(state)
    clock.now += 50.0
    record.sample(9)
    seen = record.seen()
    assert seen is not None
    assert (seen.prompt_id, seen.state, seen.at, seen.failed_node, seen.taken) == ("a", state, 3.0, "8", 0)
    record.start("b")
    before, now = record.before(), record.seen()
    assert before is not None
    assert now is not None
    assert (before.prompt_id, before.state, now.prompt_id, now.state) == ("a", state, "b", "running")
    assert told == ["changed"] * 3
