"""Peaks by node: nested and overlapping ones, a foreign reset, samples, and what is remembered."""

from __future__ import annotations

import threading

from vram_headroom.vram.peaks import NODES_KEPT, PROMPTS_KEPT, Allocated, NodePeak, PeakLedger
from vram_headroom.vram.sampler import Sampler


class Counter:
    """An allocator of paper."""

    def __init__(self) -> None:
        self.current = self.peak = 0

    def allocate(self, nbytes: int) -> None:
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def free(self, nbytes: int) -> None:
        self.current -= nbytes

    def burst(self, nbytes: int) -> None:
        """Allocate and free at once, as a forward does."""
        self.allocate(nbytes)
        self.free(nbytes)

    def read(self) -> Allocated:
        return Allocated(self.current, self.peak)

    def reset(self) -> None:
        self.peak = self.current


def ledger_of(counter: Counter) -> PeakLedger:
    ledger = PeakLedger(counter)
    ledger.start_prompt("prompt")
    return ledger


def allocated(ledger: PeakLedger) -> dict[str, int | None]:
    return {peak.node_id: peak.allocated for peak in ledger.of("prompt")}


def test_each_node_has_the_peak_of_its_own_run() -> None:
    counter = Counter()
    counter.allocate(100)
    ledger = ledger_of(counter)
    for node_id, burst in (("1", 50), ("2", 10)):
        ledger.begin(node_id, node_id, "Node")
        counter.burst(burst)
        ledger.end(node_id)
    assert allocated(ledger) == {"1": 150, "2": 110}


def test_a_nodes_peak_includes_what_runs_inside_it_and_not_the_other_way_round() -> None:
    counter = Counter()
    ledger = ledger_of(counter)
    ledger.begin("outer", "outer", "Node")
    counter.burst(90)
    ledger.begin("inner", "inner", "Node")
    counter.burst(40)
    ledger.end("inner")
    counter.burst(20)
    ledger.end("outer")
    assert allocated(ledger) == {"inner": 40, "outer": 90}


def test_nodes_that_overlap_both_have_what_happened_while_both_ran() -> None:
    counter = Counter()
    ledger = ledger_of(counter)
    ledger.begin("a", "a", "Node")
    counter.burst(10)
    ledger.begin("b", "b", "Node")
    counter.burst(70)
    ledger.end("a")
    counter.burst(30)
    ledger.end("b")
    assert allocated(ledger) == {"a": 70, "b": 70}


def test_a_foreign_reset_makes_the_peak_a_lower_bound() -> None:
    counter = Counter()
    ledger = ledger_of(counter)
    ledger.begin("1", "1", "Node")
    counter.burst(80)
    ledger.sample(0)
    counter.reset()
    counter.burst(30)
    peak = ledger.end("1")
    assert peak is not None
    assert (peak.allocated, peak.lower_bound) == (30, True)
    ledger.begin("2", "2", "Node")
    counter.burst(5)
    after = ledger.end("2")
    assert after is not None
    assert (after.allocated, after.lower_bound) == (5, False)


def test_memory_that_is_freed_is_no_foreign_reset() -> None:
    counter = Counter()
    counter.allocate(100)
    ledger = ledger_of(counter)
    ledger.begin("1", "1", "Node")
    counter.free(100)
    ledger.sample(0)
    peak = ledger.end("1")
    assert peak is not None
    assert (peak.allocated, peak.lower_bound) == (100, False)


def test_without_a_counter_only_samples_are_told_and_called_so() -> None:
    held = iter([30, 70, 20])
    ledger = PeakLedger(None, lambda: next(held))
    ledger.start_prompt("prompt")
    ledger.begin("1", "1", "Node")
    ledger.sample()
    ledger.sample()
    assert ledger.end("1", failed=True) == NodePeak("1", "Node", None, False, 70, failed=True)


def test_what_a_node_took_that_nobody_was_told_of_counts_for_the_next() -> None:
    counter = Counter()
    ledger = ledger_of(counter)
    counter.burst(80)
    ledger.begin("1", "1", "Node")
    counter.burst(10)
    ledger.end("1")
    assert [(peak.node_id, peak.allocated) for peak in ledger.of("prompt")] == [("1", 80)]


def test_a_node_that_is_told_of_twice_began_once_and_one_that_is_dropped_never_did() -> None:
    ledger = PeakLedger(None, lambda: 5)
    ledger.start_prompt("prompt")
    ledger.begin("1", "1", "Node")
    ledger.sample(9)
    ledger.begin("1", "1", "Node")
    ledger.begin("2", "2", "Node")
    ledger.drop("2")
    assert ledger.end("2") is None
    assert ledger.end("1") == NodePeak("1", "Node", None, False, 9)


def test_what_is_remembered_is_bounded() -> None:
    ledger = PeakLedger(Counter())
    for number in range(PROMPTS_KEPT + 5):
        ledger.start_prompt(f"prompt {number}")
    for _ in range(NODES_KEPT + 5):
        ledger.begin("1", "1", "Loop")
        ledger.end("1")
    assert ledger.of("prompt 4") == ()
    assert len(ledger.of(f"prompt {PROMPTS_KEPT + 4}")) == NODES_KEPT


def test_the_sampler_looks_while_it_runs_and_leaves_no_thread() -> None:
    looked = threading.Semaphore(0)
    sampler = Sampler(lambda: looked.release(), interval=0.001)
    sampler.start()
    sampler.start()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "vram_headroom_sample"]
    for _ in range(3):
        assert looked.acquire(timeout=10)
    sampler.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_a_look_that_fails_ends_the_sampling_of_this_prompt_only() -> None:
    failing = [True]
    looked = threading.Event()

    def look() -> None:
        if failing[0]:
            raise RuntimeError("driver asleep")
        looked.set()

    sampler = Sampler(look, interval=0.001)
    sampler.start()
    for thread in [thread for thread in threading.enumerate() if thread.name == "vram_headroom_sample"]:
        thread.join(10)
    sampler.stop()
    failing[0] = False
    sampler.start()
    assert looked.wait(10)
    sampler.stop()
