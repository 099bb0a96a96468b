"""The monitor: numbers of the card, stale ones marked, and answers that are the planner's."""

from collections.abc import Callable

import planlab
import pytest
from planlab import RULES, UNIT
from vram_headroom.vram.device import Accelerator, DeviceReadError, MemoryReading, SimulatedCard
from vram_headroom.vram.monitor import GPUSnapshot, NoAcceleratorError, VRAMMonitor, get_vram_monitor
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.types import Chain, HeldModel
from vram_headroom.vram.units import GIB, MIB


class FlakyCard:
    """A card whose driver can be made to fail."""

    index = 0
    name = "flaky"

    def __init__(self, kind: str = "simulated") -> None:
        self.kind = kind
        self.reading: MemoryReading | None = MemoryReading(100, 60, 30, 20)

    def read(self) -> MemoryReading:
        if self.reading is None:
            raise DeviceReadError("asleep")
        return self.reading


def monitor_of(*cards: Accelerator, reclaimable: Callable[[int], int] = lambda index: 0, safety_margin: int = 0) -> VRAMMonitor:
    return VRAMMonitor(lambda: cards, clock=lambda: 5.0, reclaimable=reclaimable, safety_margin=safety_margin)


def chain_for(card_units: int) -> Chain:
    return build_chain(planlab.two_experts(), planlab.VOCABULARY, planlab.library, RULES, planlab.card(card_units))


def test_a_snapshot_tells_ours_others_and_what_can_be_given_back() -> None:
    snapshot = monitor_of(FlakyCard(), reclaimable=lambda index: 25).snapshot()
    assert (snapshot.total, snapshot.used, snapshot.free) == (100, 40, 60)
    assert (snapshot.reserved, snapshot.active, snapshot.others) == (30, 20, 10)
    assert snapshot.reclaimable_free == 95, "60 free, 25 of the host and 10 cached"
    assert snapshot.utilization_percent == 40.0
    assert snapshot.pressure_percent == 5.0


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_what_the_driver_holds_for_this_process_is_no_other_programs_memory(kind: str) -> None:
    card = FlakyCard(kind)
    card.reading = MemoryReading(8 * GIB, 5 * GIB, GIB, GIB)
    snapshot = monitor_of(card).snapshot()
    assert (snapshot.ours, snapshot.others) == (GIB + 512 * MIB, 3 * GIB - GIB - 512 * MIB)


def test_this_process_never_holds_more_than_is_used() -> None:
    snapshot = monitor_of(FlakyCard("cuda")).snapshot()
    assert (snapshot.used, snapshot.ours, snapshot.others) == (40, 40, 0)


def test_a_host_cannot_give_back_more_than_is_used() -> None:
    assert monitor_of(FlakyCard(), reclaimable=lambda index: 10**9).snapshot().pressure_percent == 0.0


def test_one_failed_read_keeps_the_last_good_values_marked_stale() -> None:
    card = FlakyCard()
    monitor = monitor_of(card)
    assert monitor.snapshot().stale is False
    card.reading = None
    stale = monitor.snapshot()
    assert (stale.stale, stale.free) == (True, 60)
    card.reading = MemoryReading(100, 10, 30, 20)
    assert (monitor.snapshot().stale, monitor.snapshot().free) == (False, 10)


def test_a_driver_that_never_answered_says_so() -> None:
    card = FlakyCard()
    card.reading = None
    monitor = monitor_of(card)
    assert monitor.snapshots() == ()
    with pytest.raises(DeviceReadError, match="flaky has not answered"):
        monitor.snapshot()
    with pytest.raises(NoAcceleratorError, match="no accelerator 3"):
        monitor.snapshot(3)


def test_several_cards_are_told_apart() -> None:
    monitor = monitor_of(SimulatedCard(100, index=0), SimulatedCard(200, others=50, index=1))
    assert [(card.index, card.total, card.used) for card in monitor.snapshots()] == [(0, 100, 0), (1, 200, 50)]


def test_can_fit_chain_says_what_the_plan_says() -> None:
    for units in (100, 8_000, 100_000):
        monitor = monitor_of(SimulatedCard(units * UNIT, name="test card"))
        chain = chain_for(units)
        plan = make_plan(chain, planlab.card(units), RULES)
        assert monitor.can_fit_chain(chain, RULES) == (plan.runs, plan.message)


def test_an_overhead_beyond_the_plan_is_added_to_the_margin() -> None:
    chain = chain_for(20_000)
    monitor = monitor_of(SimulatedCard(20_000 * UNIT), safety_margin=5 * UNIT)
    assert monitor.plan_chain(chain, RULES).card.safety_margin == 5 * UNIT
    assert monitor.plan_chain(chain, RULES, runtime_overhead=7 * UNIT).card.safety_margin == 12 * UNIT


def test_the_latents_of_a_sampling_step_are_part_of_the_plan() -> None:
    plan = monitor_of(SimulatedCard(20_000 * UNIT)).plan_chain(chain_for(20_000), RULES)
    sample = next(planned for planned in plan.phases if planned.phase.kind == "sample")
    assert sample.activation is not None
    latents = sum(term.bytes for term in sample.activation.terms if "latent" in term.name)
    assert latents >= 4 * 4 * 16 * 21 * 80 * 80


def test_other_programs_and_the_margin_count_against_a_chain() -> None:
    card = SimulatedCard(16_000 * UNIT)
    assert monitor_of(card).can_fit_chain(chain_for(16_000), RULES).fits
    assert not monitor_of(card, safety_margin=15_500 * UNIT).can_fit_chain(chain_for(16_000), RULES).fits
    card.set_others(15_500 * UNIT)
    assert not monitor_of(card).can_fit_chain(chain_for(16_000), RULES).fits


def test_what_is_loaded_already_counts_once() -> None:
    card = SimulatedCard(20_000 * UNIT)
    card.allocate(19_000 * UNIT, "idle model")
    monitor = monitor_of(card)
    held = (HeldModel("/m/other.safetensors", "other", 19_000 * UNIT, 19_000 * UNIT),)
    assert not monitor.can_fit_chain(chain_for(20_000), RULES).fits, "19,000 units of another program would not move"
    assert monitor.can_fit_chain(chain_for(20_000), RULES, held).fits, "an idle model leaves when asked"


def test_activations_of_the_running_prompt_are_free_by_the_time_the_next_one_starts() -> None:
    card = SimulatedCard(16_000 * UNIT, others=1_000 * UNIT)
    card.allocate(6_000 * UNIT, "weights")
    card.allocate(5_000 * UNIT, "activations of what runs now")
    idle, running = monitor_of(card).card(), monitor_of(card).card(running_beside=6_000 * UNIT)
    assert idle is not None
    assert running is not None
    assert (idle.free, running.free) == (4_000 * UNIT, 9_000 * UNIT)


def test_without_an_accelerator_the_answer_is_not_a_refusal() -> None:
    plan = monitor_of().plan_chain(chain_for(100), RULES)
    assert (plan.verdict, plan.runs) == ("unknown", True)
    assert "No accelerator" in plan.message


def test_there_is_one_monitor() -> None:
    assert get_vram_monitor() is get_vram_monitor()


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(ValueError, match="safety_margin"):
        VRAMMonitor(safety_margin=-1)


def test_a_card_of_no_size_has_no_percentage() -> None:
    empty = GPUSnapshot(0, "x", "cuda", 0, 0, None, None, 0, 0.0)
    assert (empty.utilization_percent, empty.pressure_percent, empty.others) == (0.0, 0.0, None)
