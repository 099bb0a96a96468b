"""The engine as one system: what is measured, what fits, what is placed where, who leaves, and threads beside one another."""

import importlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import planlab
import pytest
import torch
from loadpack import ROOT
from paper import CARD, UNIT, BookingMover, Clock, Engine, PaperHandle
from torch._subclasses.fake_tensor import FakeTensorMode
from vram_headroom.vram.books import UnknownPipelineError
from vram_headroom.vram.components import ComponentRole
from vram_headroom.vram.device import CallbackAccelerator, DeviceReadError, MemoryReading, SimulatedCard
from vram_headroom.vram.estimate import encoders
from vram_headroom.vram.estimate.architecture import Architecture
from vram_headroom.vram.estimate.loading import Footprint
from vram_headroom.vram.handle import PlainMover, TorchModuleHandle
from vram_headroom.vram.monitor import NoAcceleratorError, VRAMMonitor, get_vram_monitor
from vram_headroom.vram.offloader import ActivePipelineError, PlacementError, VRAMOffloader, get_vram_offloader
from vram_headroom.vram.plan.types import Chain, HeldModel, HostRules, ModelRef, Phase
from vram_headroom.vram.policy import HOST_DECIDES, VideoComponentPolicy
from vram_headroom.vram.recovery import Rung
from vram_headroom.vram.status import read_status

GENERATOR, TEXT_ENCODER, VAE, OTHER = (
    ComponentRole.GENERATOR,
    ComponentRole.TEXT_ENCODER,
    ComponentRole.VAE,
    ComponentRole.OTHER,
)
PINNED = VideoComponentPolicy(pin_to_gpu=True)
STAYS = VideoComponentPolicy()
ENCODING = encoders.umt5(fp8_weights=True).expected
"""What the one phase of `encoding` needs beside its weights."""
RULES = replace(planlab.RULES, minimum_inference_bytes=ENCODING)
"""A host that keeps that much free of weights, and no more."""
PATIENCE = 20.0
"""Seconds a thread may take before a test calls it stuck."""


class Job:
    """An action on a thread of its own."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float) -> None:
        """Until it has ended, or this long: for actions that may rightly be waiting themselves."""
        self._thread.join(seconds)

    def result(self) -> object:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "stuck"
        if self._error is not None:
            raise self._error
        return self._value


@contextmanager
def held_open(handle: PaperHandle, action: Callable[[], object]) -> Iterator[Job]:
    """`action` stands still in the middle of its move of `handle` while the block runs, and has ended after it."""
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        handle.before_move = lambda: None
        entered.set()
        assert leave.wait(PATIENCE)

    handle.before_move = wait
    job = Job(action)
    try:
        assert entered.wait(PATIENCE), "the move never began"
        yield job
    finally:
        leave.set()
    job.result()


class Failure:
    """Fails each move of a handle with an out-of-memory error of its own and counts the attempts."""

    def __init__(self, times: int = 10**9, error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError("full")) -> None:
        self.attempts = 0
        self._times = times
        self._error = error

    def __call__(self) -> None:
        self.attempts += 1
        if self.attempts <= self._times:
            raise self._error()


class CachingCard:
    """A card behind a caching allocator: what tensors gave back stays reserved until the cache is emptied."""

    index = 0
    name = "caching"
    kind = "cuda"

    def __init__(self, ledger: SimulatedCard) -> None:
        self.ledger = ledger

    def read(self) -> MemoryReading:
        reading = self.ledger.read()
        return reading._replace(free=reading.total - self.ledger.peak_bytes, reserved=self.ledger.peak_bytes)


class Cards:
    """Engines of several cards, failing drivers and odd readings: an offloader over any accelerators."""

    def __init__(self, *cards: SimulatedCard | CallbackAccelerator | CachingCard, threshold: int = 0) -> None:
        self.clock = Clock()
        self.monitor = VRAMMonitor(lambda: cards, clock=self.clock, safety_margin=0)
        self.offloader = VRAMOffloader(self.monitor, self.clock, threshold, lambda: None)

    def add(self, pipeline: str, card: SimulatedCard, units: int, policy: VideoComponentPolicy = STAYS) -> PaperHandle:
        handle = PaperHandle(card, (pipeline, card.index), units * UNIT, index=card.index)
        self.offloader.register(pipeline, f"model on {card.index}", OTHER, handle, policy=policy)
        return handle


UMT5 = Architecture("text_encoder", "UMT5-XXL", dim=4096, layers=24)
PACKED = Footprint(resident=1, booked=1, staged_bytes=1, largest_layer=1, cast="native")
"""Weights of one byte each."""


def encoding(*models: ModelRef) -> Phase:
    encoders = tuple(replace(model, arch=replace(UMT5, parameters=2), footprint=PACKED) for model in models)
    return Phase("text_encode", "1", "CLIPTextEncode", encoders, title="Encoding")


def chain(*phases: Phase) -> Chain:
    return Chain(phases, tuple(model for phase in phases for model in phase.models))


def held(name: str, units: int, on_card: int) -> HeldModel:
    return HeldModel(f"/m/{name}", name, units * UNIT, on_card * UNIT)


def units_on_card(handles: Iterable[PaperHandle]) -> list[int]:
    return [handle.bytes_on_card() // UNIT for handle in handles]


def loaded(engine: Engine, pipeline: str, units: int, **options: object) -> PaperHandle:
    """A one-model pipeline that is on the card and idle."""
    role = options.get("role", OTHER)
    policy = options.get("policy")
    assert isinstance(role, ComponentRole)
    assert policy is None or isinstance(policy, VideoComponentPolicy)
    handle = engine.add(pipeline, "model", units, role, policy, elastic=bool(options.get("elastic", False)))
    handle.load()
    engine.offloader.mark_active(pipeline)
    engine.offloader.mark_idle(pipeline)
    return handle


class TestMonitor:
    """Snapshots and records: what is measured, per card and per pipeline."""

    def test_a_snapshot_is_the_ledger_to_the_byte(self) -> None:
        card = SimulatedCard(1_000, others=101)
        card.allocate(333, "model")
        seen = VRAMMonitor(lambda: (card,)).snapshot()
        assert (seen.total, seen.free, seen.used, seen.reserved, seen.others) == (1_000, 566, 434, 333, 101)

    @pytest.mark.parametrize(("handed", "counted"), [(-5, 600), (0, 600), (250, 850), (400, 1_000), (10**12, 1_000)], ids=str)
    def test_reclaimable_memory_is_the_hosts_number_within_what_is_used(self, handed: int, counted: int) -> None:
        monitor = VRAMMonitor(lambda: (SimulatedCard(1_000, others=400),), reclaimable=lambda index: handed)
        assert monitor.snapshot().reclaimable_free == counted

    def test_reclaimable_memory_is_asked_for_each_card_by_its_index(self) -> None:
        cards = (SimulatedCard(100, others=50, index=0), SimulatedCard(100, others=50, index=1))
        monitor = VRAMMonitor(lambda: cards, reclaimable={0: 10, 1: 30}.__getitem__)
        assert [seen.reclaimable_free for seen in monitor.snapshots()] == [60, 80]

    def test_one_card_that_fails_does_not_make_the_other_stale(self) -> None:
        answers = [MemoryReading(100, 60, None, None)]
        flaky = CallbackAccelerator("flaky", lambda: answers[-1] if answers else _asleep(), index=1)
        monitor = VRAMMonitor(lambda: (SimulatedCard(100), flaky))
        monitor.snapshots()
        answers.clear()
        assert [(seen.index, seen.stale, seen.free) for seen in monitor.snapshots()] == [(0, False, 100), (1, True, 60)]

    def test_a_driver_that_failed_at_first_is_heard_when_it_answers(self) -> None:
        answers: list[MemoryReading] = []
        monitor = VRAMMonitor(lambda: (CallbackAccelerator("slow", lambda: answers[0] if answers else _asleep()),))
        with pytest.raises(DeviceReadError):
            monitor.snapshot()
        answers.append(MemoryReading(100, 70, None, None))
        assert (monitor.snapshot().free, monitor.snapshot().stale) == (70, False)

    def test_a_stale_snapshot_keeps_the_time_of_its_values(self) -> None:
        clock, answers = Clock(), [MemoryReading(100, 60, None, None)]
        card = CallbackAccelerator("flaky", lambda: answers[0] if answers else _asleep())
        monitor = VRAMMonitor(lambda: (card,), clock=clock)
        taken_at = monitor.snapshot().taken_at
        answers.clear()
        clock.advance(60)
        assert monitor.snapshot().taken_at == taken_at

    def test_a_search_for_cards_that_failed_is_made_again(self) -> None:
        searches: list[int] = []

        def find() -> tuple[SimulatedCard, ...]:
            searches.append(1)
            if len(searches) == 1:
                raise DeviceReadError("the driver is being updated")
            return (SimulatedCard(100),)

        monitor = VRAMMonitor(find)
        with suppress(DeviceReadError):
            monitor.snapshots()
        assert monitor.snapshot().total == 100

    def test_other_cards_leave_no_values_of_the_old_ones_behind(self) -> None:
        monitor = VRAMMonitor(lambda: (SimulatedCard(100),))
        assert monitor.snapshot().total == 100
        monitor.connect(lambda: (CallbackAccelerator("silent", _asleep),))
        assert monitor.snapshots() == ()

    def test_connecting_cards_alone_keeps_the_hosts_reclaimable_number(self) -> None:
        monitor = VRAMMonitor(lambda: (), reclaimable=lambda index: 25)
        monitor.connect(lambda: (SimulatedCard(100, others=40),))
        assert monitor.snapshot().reclaimable_free == 85

    def test_without_a_card_there_is_nothing_to_show_and_nothing_to_plan_with(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        assert (monitor.snapshots(), monitor.card()) == ((), None)
        with pytest.raises(NoAcceleratorError):
            monitor.snapshot()

    def test_loads_and_unloads_are_counted_apart_with_their_last_deltas(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        monitor.record_pipeline_load("wan", 30)
        monitor.record_pipeline_load("wan", 31)
        monitor.record_pipeline_unload("wan", 12)
        record = monitor.pipeline_record("wan")
        assert record is not None
        assert (record.load_delta, record.unload_delta, record.loads, record.unloads) == (31, 12, 2, 1)

    def test_records_of_two_cards_are_two_records(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        monitor.record_pipeline_load("wan", 10, index=0)
        monitor.record_pipeline_load("wan", 20, index=1)
        assert {record.device_index: record.load_delta for record in monitor.pipeline_records()} == {0: 10, 1: 20}

    def test_a_components_bytes_replace_its_own_last_ones_only(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        monitor.record_component_vram("wan", "vae", 3)
        monitor.record_component_vram("wan", "dit", 30)
        monitor.record_component_vram("wan", "dit", 15)
        record = monitor.pipeline_record("wan")
        assert record is not None
        assert dict(record.components) == {"vae": 3, "dit": 15}

    def test_a_record_handed_out_never_changes(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        monitor.record_component_vram("wan", "vae", 3)
        before = monitor.pipeline_record("wan")
        monitor.record_component_vram("wan", "vae", 9)
        assert before is not None
        assert dict(before.components) == {"vae": 3}

    def test_a_component_below_zero_bytes_is_refused_and_not_recorded(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        with pytest.raises(ValueError, match="vae"):
            monitor.record_component_vram("wan", "vae", -1)
        assert monitor.pipeline_record("wan") is None

    def test_forgetting_a_pipeline_forgets_every_card_and_no_other_pipeline(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        for name in ("gone", "kept"):
            for index in (0, 1):
                monitor.record_pipeline_load(name, 5, index)
                monitor.record_video_memory(name, kv_cache=7, index=index)
        monitor.forget_pipeline("gone")
        assert [(record.pipeline, record.device_index) for record in monitor.pipeline_records()] == [("kept", 0), ("kept", 1)]
        assert [monitor.video_memory(name, 1).peak_runtime for name in ("gone", "kept")] == [0, 7]

    def test_no_record_is_lost_between_threads(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        jobs = [Job(lambda: [monitor.record_pipeline_load("wan", 1) for _ in range(100)]) for _ in range(8)]
        for job in jobs:
            job.result()
        record = monitor.pipeline_record("wan")
        assert record is not None
        assert record.loads == 800

    def test_the_peak_is_what_the_three_were_together_not_the_sum_of_their_own_peaks(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        monitor.record_video_memory("wan", kv_cache=10, temporal_buffer=1)
        monitor.record_video_memory("wan", temporal_buffer=2, vae_cache=8)
        seen = monitor.video_memory("wan")
        assert (seen.current, seen.peak_runtime) == (10, 11)

    @pytest.mark.parametrize("buffer", ["kv_cache", "temporal_buffer", "vae_cache"])
    def test_no_video_buffer_is_below_zero(self, buffer: str) -> None:
        monitor = VRAMMonitor(lambda: ())
        with pytest.raises(ValueError, match="below 0"):
            monitor.record_video_memory("wan", **{buffer: -1})

    def test_a_load_is_measured_as_what_the_pipeline_took(self) -> None:
        engine = Engine()
        engine.add("a", "model", 30)
        engine.offloader.ensure_on_gpu("a")
        record = engine.monitor.pipeline_record("a")
        assert record is not None
        assert (record.load_delta, record.loads, dict(record.components)) == (30 * UNIT, 1, {"model": 30 * UNIT})

    def test_a_load_that_had_to_evict_is_measured_without_what_others_gave_up(self) -> None:
        engine = Engine(units=100)
        loaded(engine, "old", 60)
        engine.add("new", "model", 60)
        engine.offloader.ensure_on_gpu("new")
        record = engine.monitor.pipeline_record("new")
        assert record is not None
        assert record.load_delta == 60 * UNIT

    def test_an_eviction_is_measured_for_the_pipeline_that_left(self) -> None:
        engine = Engine(units=100)
        loaded(engine, "old", 60)
        engine.offloader.ensure_headroom(70 * UNIT)
        record = engine.monitor.pipeline_record("old")
        assert record is not None
        assert (record.unload_delta, record.unloads, dict(record.components)) == (30 * UNIT, 1, {"model": 30 * UNIT})


def _asleep() -> MemoryReading:
    raise RuntimeError("asleep")


class TestChainBudget:
    """Whether a chain fits, to the byte, and what room is asked for."""

    def test_a_chain_takes_its_largest_phase_not_the_sum(self) -> None:
        both = chain(encoding(planlab.model("small", 40)), encoding(planlab.model("large", 90)))
        assert VRAMMonitor.estimate_chain_vram_gb(both, RULES) == (90 * UNIT + ENCODING) / 2**30

    def test_a_chain_without_phases_takes_nothing_fits_anywhere_and_asks_for_no_room(self) -> None:
        asked: list[int] = []
        monitor = VRAMMonitor(lambda: (SimulatedCard(1, others=1),))
        assert VRAMMonitor.estimate_chain_vram_gb(chain(), RULES) == 0.0
        assert monitor.can_fit_chain(chain(), RULES, make_room=_asking(asked)).fits
        assert asked == []

    def test_a_model_that_the_graph_puts_on_the_cpu_takes_nothing_of_the_card(self) -> None:
        absent = planlab.model("umt5", 500, on_card=False)
        assert VRAMMonitor.estimate_chain_vram_gb(chain(encoding(absent)), RULES) == 0.0

    @pytest.mark.parametrize(
        ("margin", "overhead", "others"),
        [(0, 0, 0), (7 * UNIT, 0, 0), (0, 9 * UNIT, 0), (0, 0, 5 * UNIT), (7 * UNIT, 9 * UNIT, 5 * UNIT)],
        ids=["bare", "margin", "overhead", "others", "all"],
    )
    def test_a_card_that_fits_exactly_fits_and_one_byte_less_does_not(self, margin: int, overhead: int, others: int) -> None:
        work = chain(encoding(planlab.model("umt5", 100)))
        needed = ENCODING + margin + overhead + others
        exact = VRAMMonitor(lambda: (SimulatedCard(needed, others),), safety_margin=margin)
        short = VRAMMonitor(lambda: (SimulatedCard(needed - 1, others),), safety_margin=margin)
        assert exact.can_fit_chain(work, RULES, runtime_overhead=overhead).fits
        assert not short.can_fit_chain(work, RULES, runtime_overhead=overhead).fits

    def test_a_driver_that_never_answered_refuses_nothing_and_evicts_nothing(self) -> None:
        asked: list[int] = []
        monitor = VRAMMonitor(lambda: (CallbackAccelerator("silent", _asleep),))
        answer = monitor.can_fit_chain(chain(encoding(planlab.model("umt5", 100))), RULES, make_room=_asking(asked))
        assert (answer.fits, asked) == (True, [])

    def test_a_driver_that_fails_now_is_planned_with_by_its_last_values(self) -> None:
        answers = [MemoryReading(ENCODING, ENCODING - 1, None, None)]
        card = CallbackAccelerator("flaky", lambda: answers[0] if answers else _asleep())
        monitor = VRAMMonitor(lambda: (card,), safety_margin=0)
        monitor.snapshot()
        answers.clear()
        assert not monitor.can_fit_chain(chain(encoding(planlab.model("umt5", 1))), RULES).fits

    def test_each_card_is_asked_for_itself_and_an_absent_one_refuses_nothing(self) -> None:
        cards = (SimulatedCard(ENCODING - 1, index=0), SimulatedCard(ENCODING, index=1))
        monitor = VRAMMonitor(lambda: cards, safety_margin=0)
        work = chain(encoding(planlab.model("umt5", 1)))
        assert [monitor.can_fit_chain(work, RULES, index=index).fits for index in (0, 1, 2)] == [False, True, True]

    def test_blocks_that_the_allocator_caches_are_free_to_a_chain(self) -> None:
        reading = MemoryReading(total=2 * ENCODING, free=ENCODING - 10, reserved=100, active=90)
        monitor = VRAMMonitor(lambda: (CallbackAccelerator("caching", lambda: reading),), safety_margin=0)
        assert monitor.can_fit_chain(chain(encoding(planlab.model("umt5", 1))), RULES).fits

    @pytest.mark.parametrize(
        ("on_card", "new_units"), [(0, 100), (1, 99), (60, 40), (100, 0), (130, 0)], ids=["none", "1", "60", "all", "more"]
    )
    def test_room_is_made_for_what_is_missing_whatever_is_loaded(self, on_card: int, new_units: int) -> None:
        card = SimulatedCard(on_card * UNIT + ENCODING // 2)
        card.allocate(on_card * UNIT, "umt5")
        asked: list[int] = []
        VRAMMonitor(lambda: (card,), safety_margin=0).can_fit_chain(
            chain(encoding(planlab.model("umt5", 100))), RULES, (held("umt5", 100, on_card),), make_room=_asking(asked)
        )
        assert asked == [new_units * UNIT + ENCODING]

    def test_what_is_loaded_of_another_model_makes_nothing_cheaper(self) -> None:
        card = SimulatedCard(200 * UNIT)
        card.allocate(100 * UNIT, "other")
        asked: list[int] = []
        VRAMMonitor(lambda: (card,), safety_margin=0).can_fit_chain(
            chain(encoding(planlab.model("umt5", 100))), RULES, (held("other", 100, 100),), make_room=_asking(asked)
        )
        assert asked == [100 * UNIT + ENCODING]

    def test_the_margin_and_the_runtime_overhead_are_part_of_the_room(self) -> None:
        asked: list[int] = []
        VRAMMonitor(lambda: (SimulatedCard(UNIT),), safety_margin=11).can_fit_chain(
            chain(encoding(planlab.model("umt5", 100))), RULES, runtime_overhead=13, make_room=_asking(asked)
        )
        assert asked == [100 * UNIT + ENCODING + 11 + 13]

    @pytest.mark.parametrize(("missing", "asks"), [(0, 0), (1, 1)], ids=["exactly free", "one byte short"])
    def test_no_room_is_asked_for_where_it_is_free(self, missing: int, asks: int) -> None:
        asked: list[int] = []
        card = SimulatedCard(100 * UNIT + ENCODING, others=missing)
        VRAMMonitor(lambda: (card,), safety_margin=0).can_fit_chain(
            chain(encoding(planlab.model("umt5", 100))), RULES, make_room=_asking(asked)
        )
        assert len(asked) == asks

    def test_the_answer_is_given_for_the_card_after_room_was_made(self) -> None:
        engine = Engine(units=ENCODING // UNIT + 30)
        idle = loaded(engine, "idle", 50)
        work = chain(encoding(planlab.model("umt5", 10)))
        assert not engine.monitor.can_fit_chain(work, RULES).fits
        assert engine.monitor.can_fit_chain(work, RULES, make_room=engine.offloader.ensure_headroom).fits
        assert idle.bytes_on_card() == 20 * UNIT

    def test_room_that_nobody_could_make_changes_no_answer(self) -> None:
        engine = Engine(units=ENCODING // UNIT + 30)
        busy = loaded(engine, "busy", 50)
        engine.offloader.mark_active("busy")
        work = chain(encoding(planlab.model("umt5", 10)))
        assert not engine.monitor.can_fit_chain(work, RULES, make_room=engine.offloader.ensure_headroom).fits
        assert busy.bytes_on_card() == 50 * UNIT

    def test_room_made_of_a_loaded_model_is_not_counted_a_second_time(self) -> None:
        engine = Engine(units=ENCODING // UNIT - 1)
        loaded(engine, "idle", 50)
        work = chain(encoding(planlab.model("umt5", 10)))
        answer = engine.monitor.can_fit_chain(work, RULES, (held("idle", 50, 50),), make_room=engine.offloader.ensure_headroom)
        assert not answer.fits, "the whole card is one UNIT too small for the activations alone"

    def test_room_made_of_other_models_does_not_make_a_loaded_one_count_less(self) -> None:
        engine = Engine(units=ENCODING // UNIT)
        encoder, idle = loaded(engine, "wan", 20), loaded(engine, "idle", 30)
        with engine.offloader.using("wan"):
            answer = engine.monitor.can_fit_chain(
                chain(encoding(planlab.model("umt5", 20))),
                RULES,
                (held("umt5", 20, 20),),
                make_room=engine.offloader.ensure_headroom,
            )
        assert (units_on_card((encoder, idle)), answer.fits) == ([20, 0], True), "the host streams what is loaded"

    def test_loaded_models_may_be_handed_over_one_by_one(self) -> None:
        def answer(models: Iterable[HeldModel]) -> bool:
            card = SimulatedCard(ENCODING + 20 * UNIT, others=20 * UNIT)
            card.allocate(50 * UNIT, "idle")
            monitor = VRAMMonitor(lambda: (card,), safety_margin=0)

            def make_room(wanted: int) -> int:
                card.set_others(0)
                return 20 * UNIT

            work = chain(encoding(planlab.model("umt5", 10)))
            return monitor.can_fit_chain(work, RULES, models, make_room=make_room).fits

        models = (held("idle", 50, 50),)
        assert answer(iter(models)) == answer(models) is True

    @pytest.mark.parametrize(
        ("name", "size"),
        [("width", (0, 480, 81)), ("height", (832, 0, 81)), ("frames", (832, 480, 0))],
        ids=lambda value: str(value),
    )
    def test_a_video_of_no_size_has_no_overhead_but_an_error_with_its_name(self, name: str, size: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match=name):
            VRAMMonitor.estimate_video_runtime_overhead_gb(*size)


def _asking(asked: list[int]) -> Callable[[int], int]:
    def make_room(wanted: int) -> int:
        asked.append(wanted)
        return 0

    return make_room


class Net(torch.nn.Module):
    """Parameters of several types, buffers that count and a weight that is used twice."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8, dtype=dtype)
        self.first = torch.nn.Linear(8, 8, dtype=dtype)
        self.norm = torch.nn.LayerNorm(8, dtype=torch.float32)
        self.head = torch.nn.Linear(8, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.embed(tokens))
        hidden = self.norm(hidden.float()) * self.scale
        return self.head(hidden.to(self.head.weight.dtype))

    def everything(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in (*self.parameters(), *self.buffers())]


TOKENS = torch.arange(11)


class Placed:
    """A real module, its handle, and a card that books its tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32, capacity: int | None = None) -> None:
        torch.manual_seed(3)
        self.net = Net(dtype).eval()
        self.tensors = len(self.net.everything())
        self.bytes = sum(tensor.nbytes for tensor in self.net.everything())
        self.card = SimulatedCard(self.bytes if capacity is None else capacity)
        self.mover = BookingMover(self.card)
        self.handle = TorchModuleHandle(self.net, CARD, mover=self.mover)
        self._before = self.net.everything()
        self._output = self.net(TOKENS).detach()

    def must_be_whole(self, on_card: bool) -> None:
        expected = self.bytes if on_card else 0
        assert (self.handle.bytes_on_card(), self.card.booked_bytes) == (expected, expected)
        assert all(torch.equal(now, then) for now, then in zip(self.net.everything(), self._before, strict=True))
        assert torch.equal(self.net(TOKENS), self._output)


ERRORS: Mapping[str, Callable[[], BaseException]] = {
    "bad tensor": lambda: RuntimeError("bad tensor"),
    "out of memory": lambda: torch.OutOfMemoryError("full"),
    "interrupt": lambda: KeyboardInterrupt(),
}


class TestPlacement:
    """To the card and off it: pipelines of paper, and real modules tensor by tensor."""

    def test_a_video_pipeline_comes_without_what_leaves_between_prompts(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        assert engine.offloader.ensure_on_gpu("wan") == 33 * UNIT
        assert units_on_card(parts.values()) == [30, 0, 3]

    def test_any_other_pipeline_comes_whole(self) -> None:
        engine = Engine()
        engine.add("flux", "encoder", 15, TEXT_ENCODER)
        engine.add("flux", "more", 5)
        assert engine.offloader.ensure_on_gpu("flux") == 20 * UNIT
        assert engine.ledger() == 20

    def test_a_text_encoder_comes_and_leaves_while_its_pipeline_stays_active(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            assert engine.offloader.ensure_text_encoder_on_gpu("wan") == 15 * UNIT
            assert engine.offloader.offload_text_encoder("wan") == 15 * UNIT
            assert units_on_card(parts.values()) == [30, 0, 3]

    def test_components_of_the_roles_asked_for_come_and_no_others(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        engine.offloader.ensure_components_on_gpu("wan", (VAE, TEXT_ENCODER))
        assert units_on_card(parts.values()) == [0, 15, 3]

    def test_what_is_on_the_card_is_not_moved_there_again(self) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30)
        assert [engine.offloader.ensure_on_gpu("a") for _ in range(3)] == [30 * UNIT, 0, 0]
        assert model.loads == 1

    def test_of_a_model_that_is_there_in_part_only_the_rest_comes(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        model.unload(10 * UNIT)
        assert engine.offloader.status()[0].components[0].placement == "partial"
        assert engine.offloader.ensure_on_gpu("a") == 10 * UNIT
        assert engine.offloader.status()[0].components[0].placement == "gpu"

    def test_a_pin_holds_against_offloading_until_it_is_released(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.offloader.ensure_on_gpu("wan")
        assert engine.offloader.offload_to_cpu("wan") == 30 * UNIT
        assert engine.ledger() == 3
        assert engine.offloader.offload_to_cpu("wan", release_pins=True) == 3 * UNIT
        assert engine.ledger() == 0

    def test_an_active_pipeline_refuses_to_be_offloaded_and_stays_whole(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        with engine.offloader.using("a"), pytest.raises(ActivePipelineError, match="a is in use"):
            engine.offloader.offload_to_cpu("a", release_pins=True)
        assert (model.bytes_on_card(), model.unloads) == (30 * UNIT, 0)

    def test_a_pipeline_that_its_host_computes_with_refuses_to_be_offloaded(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        model.in_use = True
        assert engine.offloader.status()[0].state == "active"
        with pytest.raises(ActivePipelineError):
            engine.offloader.offload_to_cpu("a")
        assert model.bytes_on_card() == 30 * UNIT

    def test_the_end_of_our_use_takes_nothing_that_the_host_still_computes_with(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            parts["generator"].in_use = True
        assert units_on_card(parts.values()) == [30, 0, 3]

    @pytest.mark.parametrize(
        "ask",
        ["mark_active", "mark_idle", "ensure_on_gpu", "ensure_text_encoder_on_gpu", "offload_to_cpu", "offload_text_encoder"],
    )
    def test_a_pipeline_nobody_registered_is_named_in_the_error(self, ask: str) -> None:
        with pytest.raises(UnknownPipelineError, match="'wann'"):
            getattr(Engine().offloader, ask)("wann")

    def test_a_model_belongs_to_the_pipeline_that_registered_it_last(self) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30)
        engine.offloader.register("b", "model", OTHER, model)
        engine.offloader.ensure_on_gpu("b")
        assert engine.offloader.pipeline_of(model.key) == "b"
        assert [(p.name, len(p.components)) for p in engine.offloader.status()] == [("b", 1)]
        assert engine.on_card() == engine.ledger() == 30

    def test_what_the_host_places_is_never_moved(self) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30, GENERATOR, HOST_DECIDES)
        engine.offloader.ensure_on_gpu("a")
        assert (model.loads, engine.ledger()) == (0, 0)
        model.load()
        with engine.offloader.using("a"):
            pass
        engine.offloader.offload_to_cpu("a", release_pins=True)
        for rung in Rung:
            engine.offloader.free_rung(rung, "a")
        assert (model.unloads, engine.ledger()) == (0, 30)

    def test_an_elastic_model_is_the_hosts_affair_unless_somebody_says_otherwise(self) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30, GENERATOR, elastic=True)
        assert engine.offloader.ensure_on_gpu("a") == 0
        assert model.loads == 0

    def test_a_load_that_fails_leaves_the_model_on_the_cpu_and_the_rest_where_it_was(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        parts["vae"].before_move = Failure(error=lambda: RuntimeError("bad tensor"))
        with pytest.raises(RuntimeError, match="bad tensor"):
            engine.offloader.ensure_on_gpu("wan")
        assert units_on_card(parts.values()) == [30, 0, 0]
        last = engine.offloader.history()[-1]
        assert (last.component, last.source, last.target, last.bytes) == ("vae", "cpu", "cpu", 0)
        assert last.error == "RuntimeError: bad tensor"

    def test_an_unload_that_fails_says_which_component_where_and_why(self) -> None:
        engine = Engine()
        model = loaded(engine, "wan", 30)
        model.before_move = Failure(error=lambda: RuntimeError("bad tensor"))
        with pytest.raises(PlacementError, match=r"model of pipeline wan could not leave the card.*bad tensor"):
            engine.offloader.offload_to_cpu("wan")
        assert engine.on_card() == engine.ledger() == 30

    def test_a_component_that_can_not_leave_does_not_keep_the_others(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            engine.offloader.ensure_text_encoder_on_gpu("wan")
            parts["generator"].before_move = Failure(error=lambda: RuntimeError("bad tensor"))
        assert units_on_card(parts.values()) == [30, 0, 3]

    @pytest.mark.parametrize("direction", ["load", "unload"])
    def test_an_interrupt_passes_through_a_move_and_is_noted(self, direction: str) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30)
        if direction == "unload":
            model.load()
        model.before_move = Failure(error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            (engine.offloader.ensure_on_gpu if direction == "load" else engine.offloader.offload_to_cpu)("a")
        last = engine.offloader.history()[-1]
        assert (last.source == last.target, last.error) == (True, "KeyboardInterrupt: ")

    def test_an_object_without_models_registers_nothing_and_says_so(self) -> None:
        engine = Engine()
        with pytest.raises(ValueError, match="no model was found in object"):
            engine.offloader.register_object("a", object(), lambda model: PaperHandle(engine.card, "x", 1))
        assert engine.offloader.status() == ()

    def test_a_forgotten_pipeline_leaves_its_models_where_they_are(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        assert [engine.offloader.unregister("a"), engine.offloader.unregister("a")] == [True, False]
        assert (model.bytes_on_card(), engine.ledger(), engine.offloader.status()) == (30 * UNIT, 30, ())

    def test_uses_nest_and_end_whatever_happens_in_them(self) -> None:
        engine = Engine()
        loaded(engine, "a", 30)

        def state() -> str:
            return engine.offloader.status()[0].state

        with engine.offloader.using("a"):
            with pytest.raises(KeyError), engine.offloader.using("a"):
                raise KeyError
            assert state() == "active"
        assert state() == "idle"

    def test_one_end_of_use_too_many_does_not_eat_the_next_use(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        engine.offloader.mark_idle("a")
        engine.offloader.mark_active("a")
        assert engine.offloader.ensure_headroom(100 * UNIT) == 0
        assert model.bytes_on_card() == 30 * UNIT

    def test_a_use_whose_pipeline_was_forgotten_ends_without_an_error(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        with engine.offloader.using("a"):
            model.alive = False
            assert engine.offloader.status() == ()
        assert engine.offloader.status() == ()

    def test_a_pipeline_registered_anew_while_it_is_used_is_still_in_use(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        with engine.offloader.using("a"):
            engine.offloader.unregister("a")
            engine.offloader.register("a", "model", OTHER, model)
            assert (engine.offloader.status()[0].state, engine.offloader.ensure_headroom(100 * UNIT)) == ("active", 0)
        assert engine.offloader.status()[0].state == "idle"

    def test_a_use_that_ended_while_its_pipeline_was_forgotten_has_ended(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)
        engine.offloader.mark_active("a")
        engine.offloader.unregister("a")
        with suppress(UnknownPipelineError):
            engine.offloader.mark_idle("a")
        engine.offloader.register("a", "model", OTHER, model)
        assert engine.offloader.status()[0].state == "idle"

    def test_a_machine_without_a_card_moves_models_all_the_same(self) -> None:
        ledger = SimulatedCard(100 * UNIT)
        bare = Cards()
        model = bare.add("a", ledger, 30)
        assert bare.offloader.ensure_on_gpu("a") == 30 * UNIT
        assert (model.bytes_on_card(), bare.offloader.offload_to_cpu("a")) == (30 * UNIT, 30 * UNIT)

    def test_a_full_life(self) -> None:
        engine = Engine(units=100)
        offloader, parts = engine.offloader, engine.add_wan("wan", 50, 20, 5)
        states = [(offloader.status()[0].state, engine.ledger())]
        with offloader.using("wan"):
            offloader.ensure_text_encoder_on_gpu("wan")
            states.append((offloader.status()[0].state, engine.ledger()))
            offloader.offload_text_encoder("wan")
            offloader.ensure_on_gpu("wan")
            states.append((offloader.status()[0].state, engine.ledger()))
        states.append((offloader.status()[0].state, engine.ledger()))
        offloader.offload_to_cpu("wan", release_pins=True)
        states.append((offloader.status()[0].state, engine.ledger()))
        assert states == [("offloaded", 0), ("active", 20), ("active", 55), ("idle", 5), ("offloaded", 0)]
        assert [(move.component, move.target, move.bytes // UNIT, move.reason) for move in offloader.history()] == [
            ("text_encoder", "gpu", 20, "asked"),
            ("text_encoder", "cpu", 20, "between uses"),
            ("generator", "gpu", 50, "asked"),
            ("vae", "gpu", 5, "asked"),
            ("generator", "cpu", 50, "idle"),
            ("vae", "cpu", 5, "asked"),
        ]
        assert offloader.unregister("wan")
        assert (offloader.status(), units_on_card(parts.values())) == ((), [0, 0, 0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_a_module_computes_the_same_bits_before_on_and_after_the_card(self, dtype: torch.dtype) -> None:
        placed = Placed(dtype)
        for _ in range(2):
            assert placed.handle.load() == placed.bytes
            placed.must_be_whole(on_card=True)
            assert placed.handle.unload() == placed.bytes
            placed.must_be_whole(on_card=False)

    @pytest.mark.parametrize("error", ERRORS)
    @pytest.mark.parametrize("direction", ["load", "unload"])
    def test_an_error_at_any_tensor_leaves_a_module_whole_on_one_side(self, direction: str, error: str) -> None:
        placed = Placed()
        starts_on_card = direction == "unload"
        if starts_on_card:
            placed.handle.load()
        move = placed.handle.unload if starts_on_card else placed.handle.load
        for position in range(placed.tensors):
            placed.mover.fail_at, placed.mover.error = position, ERRORS[error]()
            with pytest.raises(type(placed.mover.error)):
                move()
            placed.must_be_whole(on_card=starts_on_card)
        assert move() == placed.bytes
        placed.must_be_whole(on_card=not starts_on_card)

    def test_a_card_one_byte_too_small_takes_no_tensor_and_one_that_fits_exactly_takes_all(self) -> None:
        size = Placed().bytes
        small, exact = Placed(capacity=size - 1), Placed(capacity=size)
        with pytest.raises(torch.OutOfMemoryError):
            small.handle.load()
        small.must_be_whole(on_card=False)
        exact.handle.load()
        exact.must_be_whole(on_card=True)
        assert exact.card.peak_bytes == size, "no tensor is on the card twice"

    def test_a_shared_weight_moves_once_and_stays_shared(self) -> None:
        placed = Placed()
        assert placed.handle.total_bytes() == placed.bytes
        placed.handle.load()
        placed.handle.unload()
        assert placed.net.head.weight is placed.net.embed.weight
        assert placed.net.head.weight.data_ptr() == placed.net.embed.weight.data_ptr()

    def test_an_optimiser_and_a_hook_keep_the_parameters_they_know(self) -> None:
        placed = Placed()
        known = list(placed.net.parameters())
        placed.handle.load()
        assert all(now is then for now, then in zip(placed.net.parameters(), known, strict=True))

    def test_a_module_leaves_whole_for_any_byte_and_stays_for_none(self) -> None:
        placed = Placed()
        placed.handle.load()
        assert [placed.handle.unload(0), placed.handle.unload(1), placed.handle.unload(1)] == [0, placed.bytes, 0]
        placed.must_be_whole(on_card=False)

    def test_a_module_without_tensors_is_placed_without_a_move(self) -> None:
        engine = Engine()
        handle = TorchModuleHandle(torch.nn.ReLU(), CARD, mover=BookingMover(engine.card))
        engine.offloader.register("a", "relu", OTHER, handle)
        assert (engine.offloader.ensure_on_gpu("a"), engine.offloader.offload_to_cpu("a")) == (0, 0)
        assert engine.offloader.status()[0].components[0].placement == "cpu"

    def test_a_card_named_without_its_number_knows_its_own_tensors(self) -> None:
        with FakeTensorMode():
            there = torch.empty(4, device="cuda")
        assert PlainMover().is_on(there, torch.device("cuda"))
        assert not PlainMover().is_on(there, torch.device("cpu"))
        assert not PlainMover().is_on(there, torch.device("cuda", 1))


class TestEviction:
    """Who leaves for whom, in which order, how far, and how often it is tried."""

    def test_the_least_recently_used_leaves_first_and_only_as_many_as_must(self) -> None:
        engine = Engine(units=90)
        handles = [loaded(engine, name, 30) for name in "abc"]
        engine.clock.advance(10)
        for name in "ca":
            with engine.offloader.using(name):
                engine.clock.advance(10)
        assert engine.offloader.ensure_headroom(40 * UNIT) == 40 * UNIT
        assert units_on_card(handles) == [30, 0, 20], "b was used last of all the longest ago, then c"

    def test_bringing_a_pipeline_to_the_card_again_is_a_use(self) -> None:
        engine = Engine(units=60)
        handles = [loaded(engine, name, 30) for name in "ab"]
        engine.offloader.ensure_on_gpu("a")
        engine.offloader.ensure_headroom(30 * UNIT)
        assert units_on_card(handles) == [30, 0]

    def test_a_use_is_as_recent_as_its_end(self) -> None:
        engine = Engine(units=60)
        handles = [loaded(engine, name, 30) for name in "ab"]
        engine.offloader.mark_active("a")
        with engine.offloader.using("b"):
            engine.clock.advance(5)
        engine.clock.advance(5)
        engine.offloader.mark_idle("a")
        engine.offloader.ensure_headroom(30 * UNIT)
        assert units_on_card(handles) == [30, 0]

    @pytest.mark.parametrize(
        ("delta", "freed"),
        [(-1, 0), (0, 0), (40 * UNIT, 0), (40 * UNIT + 1, 1), (100 * UNIT, 60 * UNIT), (101 * UNIT, 60 * UNIT)],
        ids=["below zero", "zero", "exactly free", "one byte more", "the whole card", "more than the card"],
    )
    def test_headroom_frees_what_is_missing_to_the_byte(self, delta: int, freed: int) -> None:
        engine = Engine(units=100)
        loaded(engine, "a", 60)
        assert engine.offloader.ensure_headroom(delta) == freed
        assert engine.card.booked_bytes == 60 * UNIT - freed

    def test_what_is_to_be_kept_stays(self) -> None:
        engine = Engine(units=60)
        handles = [loaded(engine, name, 30) for name in "ab"]
        assert engine.offloader.ensure_headroom(60 * UNIT, keep=("a",)) == 30 * UNIT
        assert units_on_card(handles) == [30, 0]

    @pytest.mark.parametrize("bound", ["pinned", "elastic", "host decides", "in use by the host", "active"])
    def test_what_may_not_leave_stays_however_much_is_asked(self, bound: str) -> None:
        engine = Engine(units=60, threshold=60)
        policy = {"pinned": PINNED, "host decides": HOST_DECIDES}.get(bound, STAYS)
        model = engine.add("a", "model", 30, policy=policy, elastic=bound == "elastic")
        model.load()
        model.in_use = bound == "in use by the host"
        if bound == "active":
            engine.offloader.mark_active("a")
        freed = engine.offloader.ensure_headroom(60 * UNIT) + engine.offloader.evict_below_threshold()
        freed += engine.offloader.free_rung(Rung.IDLE_PIPELINES)
        assert (freed, model.unloads, engine.ledger()) == (0, 0, 30)

    def test_of_one_pipeline_the_lowest_priority_leaves_first(self) -> None:
        engine = Engine(units=100)
        parts = engine.add_wan("wan", 30, 15, 3)
        other = engine.add("wan", "lora", 5)
        for handle in (*parts.values(), other):
            handle.load()
        free = 100 - 53
        left = []
        for wanted in (15, 20, 50):
            engine.offloader.ensure_headroom((free + wanted) * UNIT)
            left.append(units_on_card((parts["text_encoder"], other, parts["generator"], parts["vae"])))
        assert left == [[0, 5, 30, 3], [0, 0, 30, 3], [0, 0, 0, 3]]

    def test_the_default_threshold_is_one_and_a_half_gib(self) -> None:
        assert VRAMOffloader(VRAMMonitor(lambda: ())).threshold == 1_610_612_736

    def test_a_threshold_below_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match="threshold"):
            VRAMOffloader(threshold=-1)

    @pytest.mark.parametrize(("missing", "left"), [(0, 30 * UNIT), (1, 30 * UNIT - 1)], ids=["at it", "one byte below"])
    def test_idle_pipelines_leave_below_the_threshold_and_not_at_it(self, missing: int, left: int) -> None:
        engine = Engine(units=100, threshold=20)
        model = loaded(engine, "a", 30)
        engine.card.set_others(50 * UNIT + missing)
        engine.offloader.evict_below_threshold()
        assert model.bytes_on_card() == left

    def test_the_threshold_is_looked_at_when_a_use_ends(self) -> None:
        engine = Engine(units=100, threshold=20)
        model = engine.add("a", "model", 90)
        with engine.offloader.using("a"):
            engine.offloader.ensure_on_gpu("a")
            assert model.bytes_on_card() == 90 * UNIT
        assert engine.card.free_bytes == 20 * UNIT

    def test_the_threshold_is_looked_at_after_a_load_and_spares_what_was_loaded(self) -> None:
        engine = Engine(units=100, threshold=20)
        old = loaded(engine, "old", 40)
        new = engine.add("new", "model", 50)
        engine.offloader.ensure_on_gpu("new")
        assert units_on_card((old, new)) == [30, 50]

    def test_a_threshold_of_zero_evicts_nothing_from_a_full_card(self) -> None:
        engine = Engine(units=30, threshold=0)
        loaded(engine, "a", 30)
        assert (engine.offloader.evict_below_threshold(), engine.ledger()) == (0, 30)

    def test_memory_that_the_host_gives_back_counts_as_free(self) -> None:
        engine = Engine(units=100, threshold=20)
        loaded(engine, "a", 50)
        engine.card.set_others(45 * UNIT)
        engine.monitor.connect(lambda: (engine.card,), reclaimable=lambda index: 15 * UNIT)
        assert engine.offloader.evict_below_threshold() == 0
        engine.monitor.connect(lambda: (engine.card,), reclaimable=lambda index: 14 * UNIT)
        assert engine.offloader.evict_below_threshold() == UNIT

    def test_blocks_that_the_allocator_caches_are_not_evicted_for(self) -> None:
        ledger = SimulatedCard(100 * UNIT)
        cached = Cards(CachingCard(ledger))
        handles = [cached.add(name, ledger, 30) for name in "abc"]
        for name in "abc":
            cached.offloader.ensure_on_gpu(name)
        assert cached.offloader.ensure_headroom(40 * UNIT) == 30 * UNIT
        assert units_on_card(handles) == [0, 30, 30], "what a gave back is the allocator's to hand out again"

    @pytest.mark.parametrize("driver", ["none", "silent"])
    def test_nothing_is_evicted_for_a_number_nobody_knows(self, driver: str) -> None:
        ledger = SimulatedCard(100 * UNIT)
        cards = Cards(*(() if driver == "none" else (CallbackAccelerator("silent", _asleep),)), threshold=100 * UNIT)
        model = cards.add("a", ledger, 30)
        model.load()
        with cards.offloader.using("a"):
            pass
        assert (cards.offloader.ensure_headroom(10**15), model.bytes_on_card()) == (0, 30 * UNIT)

    def test_old_values_of_a_driver_that_fails_evict_what_they_say_is_missing_and_no_more(self) -> None:
        ledger = SimulatedCard(100 * UNIT)
        awake = [True]
        cards = Cards(CallbackAccelerator("flaky", lambda: ledger.read() if awake else _asleep()))
        handles = [cards.add(name, ledger, 30) for name in "abc"]
        for handle in handles:
            handle.load()
        cards.monitor.snapshot()
        awake.clear()
        assert cards.offloader.ensure_headroom(40 * UNIT) == 30 * UNIT
        assert units_on_card(handles) == [0, 30, 30]

    def test_room_on_one_card_is_not_made_on_another(self) -> None:
        first, second = SimulatedCard(100 * UNIT, index=0), SimulatedCard(100 * UNIT, index=1)
        cards = Cards(first, second)
        here, there = cards.add("a", first, 60), cards.add("a", second, 60)
        cards.offloader.ensure_on_gpu("a")
        assert cards.offloader.ensure_headroom(50 * UNIT, index=1) == 10 * UNIT
        assert units_on_card((here, there)) == [60, 50]

    def test_the_end_of_a_use_looks_at_the_threshold_of_the_card_that_was_used(self) -> None:
        first, second = SimulatedCard(100 * UNIT, index=0), SimulatedCard(100 * UNIT, index=1)
        cards = Cards(first, second, threshold=50 * UNIT)
        model = cards.add("a", second, 60)
        with cards.offloader.using("a"):
            cards.offloader.ensure_on_gpu("a")
        assert units_on_card((model,)) == [50]

    def test_a_load_on_two_cards_is_measured_on_each(self) -> None:
        first, second = SimulatedCard(100 * UNIT, index=0), SimulatedCard(100 * UNIT, index=1)
        cards = Cards(first, second)
        cards.add("a", first, 20)
        cards.add("a", second, 60)
        cards.offloader.ensure_on_gpu("a")
        assert {r.device_index: r.load_delta for r in cards.monitor.pipeline_records()} == {0: 20 * UNIT, 1: 60 * UNIT}

    def test_a_victim_that_can_not_be_moved_is_passed_over_for_the_next(self) -> None:
        engine = Engine(units=60)
        stuck, next_one = loaded(engine, "a", 30), loaded(engine, "b", 30)
        stuck.before_move = Failure(error=lambda: RuntimeError("bad tensor"))
        assert engine.offloader.ensure_headroom(20 * UNIT) == 20 * UNIT
        assert units_on_card((stuck, next_one)) == [30, 10]

    def test_after_three_retries_in_a_row_the_error_is_the_callers(self) -> None:
        engine, parts, failure = _out_of_luck()
        with pytest.raises(torch.OutOfMemoryError):
            engine.offloader.ensure_components_on_gpu("wan", (VAE,))
        assert failure.attempts == 4
        assert units_on_card(parts.values()) == [30, 0, 0], "three rungs were used up; the generator's was not reached"

    def test_each_call_has_retries_of_its_own_and_the_same_limit(self) -> None:
        refilled = Refilled()
        refilled.first.before_move = first = refilled.failing(times=10**9)
        for calls in (1, 2, 3):
            with pytest.raises(torch.OutOfMemoryError):
                refilled.engine.offloader.ensure_on_gpu("a")
            assert first.attempts == 4 * calls

    def test_a_rung_that_frees_nothing_costs_no_retry(self) -> None:
        engine = Engine(units=200, others=10)
        engine.offloader = VRAMOffloader(engine.monitor, engine.clock, 0, lambda: engine.card.set_others(0))
        pinned, model = loaded(engine, "idle", 20, policy=PINNED), engine.add("a", "model", 40)
        failure = Failure()

        def fail_beside_the_pin() -> None:
            # enough is free by the numbers, but in pieces
            failure.attempts += 1
            if pinned.bytes_on_card():
                raise torch.OutOfMemoryError("fragmented")

        engine.offloader.register("a", "model", OTHER, model)
        model.before_move = fail_beside_the_pin
        assert engine.offloader.ensure_on_gpu("a") == 40 * UNIT
        assert failure.attempts == 3, "the first, one after the cache, one after the pins"

    def test_one_pipelines_failures_cost_another_no_retry(self) -> None:
        engine, _, _ = _out_of_luck()
        with pytest.raises(torch.OutOfMemoryError):
            engine.offloader.ensure_components_on_gpu("wan", (VAE,))
        loaded(engine, "idle again", 10)
        lucky = engine.add("lucky", "model", 10)
        lucky.before_move = Failure(times=1)
        assert engine.offloader.ensure_on_gpu("lucky") == 10 * UNIT

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
    def test_what_is_not_out_of_memory_is_not_tried_again(self, error: type[BaseException]) -> None:
        engine = Engine()
        idle, model = loaded(engine, "idle", 10), engine.add("a", "model", 30)
        model.before_move = failure = Failure(error=lambda: error("no"))
        with pytest.raises(error):
            engine.offloader.ensure_on_gpu("a")
        assert (failure.attempts, idle.bytes_on_card(), engine.cleanups) == (1, 10 * UNIT, 0)

    def test_a_load_that_fails_and_then_fits_is_a_success(self) -> None:
        engine = Engine()
        idle, model = loaded(engine, "idle", 10), engine.add("a", "model", 30)
        model.before_move = failure = Failure(times=1)
        assert engine.offloader.ensure_on_gpu("a") == 30 * UNIT
        assert (failure.attempts, model.loads, engine.ledger()) == (2, 1, 30 + idle.bytes_on_card() // UNIT)

    def test_with_nothing_else_left_the_pins_of_an_idle_pipeline_go(self) -> None:
        engine = Engine(units=40)
        pinned = loaded(engine, "idle", 20, policy=PINNED)
        model = engine.add("a", "model", 40)
        assert engine.offloader.ensure_on_gpu("a") == 40 * UNIT
        assert units_on_card((pinned, model)) == [0, 40]

    def test_the_pins_of_an_active_pipeline_never_go_for_another(self) -> None:
        engine = Engine(units=40)
        pinned = loaded(engine, "busy", 20, policy=PINNED)
        model = engine.add("a", "model", 40)
        with engine.offloader.using("busy"), pytest.raises(torch.OutOfMemoryError):
            engine.offloader.ensure_on_gpu("a")
        assert units_on_card((pinned, model)) == [20, 0]
        assert engine.on_card() == engine.ledger() == 20

    @pytest.mark.parametrize(
        ("rung", "left"),
        [
            (Rung.CACHE, [30, 15, 3, 10, 5]),
            (Rung.IDLE_PIPELINES, [30, 15, 3, 0, 5]),
            (Rung.TEXT_ENCODER, [30, 0, 3, 10, 5]),
            (Rung.PART_OF_GENERATOR, [15, 15, 3, 10, 5]),
            (Rung.PINS, [30, 15, 0, 10, 0]),
        ],
        ids=lambda value: value.name if isinstance(value, Rung) else "",
    )
    def test_each_rung_takes_what_it_is_named_for(self, rung: Rung, left: list[int]) -> None:
        engine = Engine(units=100)
        parts = engine.add_wan("wan")
        others = [engine.add("idle", "model", 10), engine.add("idle", "vae", 5, VAE)]
        handles = [*parts.values(), *others]
        for handle in handles:
            handle.load()
        engine.offloader.mark_active("wan")
        freed = engine.offloader.free_rung(rung, "wan")
        assert (units_on_card(handles), freed // UNIT) == (left, 63 - sum(left))
        assert engine.cleanups == (rung is Rung.CACHE)

    @pytest.mark.parametrize("role", [GENERATOR, TEXT_ENCODER, VAE, OTHER], ids=lambda role: role.value)
    def test_a_pin_of_any_role_holds_until_the_last_rung(self, role: ComponentRole) -> None:
        engine = Engine()
        engine.add("a", "model", 30, role, PINNED).load()
        left = []
        for rung in Rung:
            engine.offloader.free_rung(rung, "a")
            left.append(engine.ledger())
        assert left == [30, 30, 30, 30, 0]

    def test_a_pipeline_does_not_give_up_what_it_is_just_bringing(self) -> None:
        engine = Engine(units=35)
        parts = engine.add_wan("wan", 30, 15, 6)
        with pytest.raises(torch.OutOfMemoryError):
            engine.offloader.ensure_on_gpu("wan")
        assert units_on_card(parts.values()) == [30, 0, 0]
        assert engine.on_card() == engine.ledger() == 30

    def test_its_own_text_encoder_leaves_for_the_generator(self) -> None:
        engine = Engine(units=40)
        parts = engine.add_wan("wan", 30, 15, 3)
        with engine.offloader.using("wan"):
            engine.offloader.ensure_text_encoder_on_gpu("wan")
            engine.offloader.ensure_on_gpu("wan")
            assert units_on_card(parts.values()) == [30, 0, 3]


def _out_of_luck() -> tuple[Engine, dict[str, PaperHandle], Failure]:
    """A pipeline whose VAE never fits though every rung frees something."""
    engine = Engine(units=200, others=50)
    engine.offloader = VRAMOffloader(
        engine.monitor, engine.clock, 0, lambda: engine.card.set_others(max(0, engine.card.read().total // 4 - UNIT))
    )
    loaded(engine, "idle", 10)
    parts = engine.add_wan("wan")
    parts["generator"].load()
    parts["text_encoder"].load()
    parts["vae"].before_move = failure = Failure()
    return engine, parts, failure


class Refilled:
    """Two models to load on a card where the cache, an idle pipeline and its pin have bytes to give after every failure."""

    def __init__(self) -> None:
        self.engine = Engine(units=100)
        self.engine.offloader = VRAMOffloader(self.engine.monitor, self.engine.clock, 0, lambda: self.engine.card.set_others(0))
        self.first, self.second = self.engine.add("a", "first", 10), self.engine.add("a", "second", 10)
        self._givers = [self.engine.add("idle", "model", 10), self.engine.add("idle", "vae", 5, VAE)]
        self._refill()

    def failing(self, times: int) -> Failure:
        def refill_and_fail() -> BaseException:
            self._refill()
            return torch.OutOfMemoryError("full")

        return Failure(times, refill_and_fail)

    def _refill(self) -> None:
        self.engine.card.set_others(UNIT)
        for giver in self._givers:
            giver.load()


class TestThreads:
    """Many threads over one card: who waits, who does not, and what is true afterwards."""

    @pytest.mark.parametrize(
        "read",
        [
            lambda engine: engine.offloader.status(),
            lambda engine: engine.offloader.history(),
            lambda engine: engine.offloader.get_loaded_pipelines(),
            lambda engine: engine.offloader.pipeline_of(("slow", "model")),
            lambda engine: read_status("1", engine.monitor, engine.offloader, (), None, HostRules(), ()),
        ],
        ids=["status", "history", "loaded pipelines", "pipeline of", "whole status"],
    )
    @pytest.mark.parametrize("direction", ["load", "unload"])
    def test_a_look_waits_for_no_move(self, direction: str, read: Callable[[Engine], object]) -> None:
        engine = Engine()
        model = engine.add("slow", "model", 30)
        if direction == "unload":
            model.load()
        move = engine.offloader.ensure_on_gpu if direction == "load" else engine.offloader.offload_to_cpu
        with held_open(model, lambda: move("slow")):
            Job(lambda: read(engine)).result()
            (pipeline,) = engine.offloader.status()
            assert pipeline.components[0].placement == ("cpu" if direction == "load" else "gpu")
        assert engine.ledger() == (30 if direction == "load" else 0)

    def test_another_pipeline_lives_its_life_beside_a_long_move(self) -> None:
        engine = Engine()
        slow, quick = engine.add("slow", "model", 30), engine.add_wan("quick")
        with held_open(slow, lambda: engine.offloader.ensure_on_gpu("slow")):

            def live() -> int:
                with engine.offloader.using("quick"):
                    return engine.offloader.ensure_on_gpu("quick")

            assert Job(live).result() == 33 * UNIT
        assert units_on_card((slow, *quick.values())) == [30, 0, 0, 3]

    def test_a_pipeline_that_is_being_moved_is_passed_over_for_the_next_victim(self) -> None:
        engine = Engine(units=60)
        moving, idle = loaded(engine, "moving", 30), loaded(engine, "idle", 30)
        with held_open(moving, lambda: engine.offloader.offload_to_cpu("moving")):
            assert Job(lambda: engine.offloader.ensure_headroom(10 * UNIT)).result() == 10 * UNIT
            assert units_on_card((moving, idle)) == [30, 20]

    def test_a_use_that_begins_during_an_eviction_waits_for_its_end(self) -> None:
        engine = Engine(units=30)
        model = loaded(engine, "a", 30)
        seen: list[int] = []

        def use() -> None:
            engine.offloader.mark_active("a")
            seen.append(model.bytes_on_card())
            engine.offloader.ensure_on_gpu("a")

        with held_open(model, lambda: engine.offloader.ensure_headroom(30 * UNIT)):
            job = Job(use)
        job.result()
        assert (seen, model.bytes_on_card()) == ([0], 30 * UNIT)

    def test_a_pipeline_that_was_chosen_to_leave_stays_when_its_use_begins_first(self) -> None:
        engine = Engine(units=60)
        first, second = loaded(engine, "a", 30), loaded(engine, "b", 30)
        with held_open(first, lambda: engine.offloader.ensure_headroom(60 * UNIT)):
            Job(lambda: engine.offloader.mark_active("b")).result()
        assert units_on_card((first, second)) == [0, 30]

    def test_a_use_that_begins_before_the_idle_components_left_keeps_them(self) -> None:
        engine = Engine()
        parts = engine.add_wan("wan")
        engine.offloader.mark_active("wan")
        engine.offloader.ensure_on_gpu("wan")

        def encode_and_go_on() -> None:
            with engine.offloader._books.find("wan").moving:
                engine.offloader.ensure_text_encoder_on_gpu("wan")
                engine.offloader.mark_active("wan")

        with held_open(parts["text_encoder"], encode_and_go_on):
            job = Job(lambda: engine.offloader.mark_idle("wan"))
            job.wait(0.2)
        job.result()
        assert units_on_card(parts.values()) == [30, 15, 3]

    def test_two_threads_that_want_one_pipeline_load_it_once(self) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30)
        with held_open(model, lambda: engine.offloader.ensure_on_gpu("a")):
            second = Job(lambda: engine.offloader.ensure_on_gpu("a"))
        assert (second.result(), model.loads, engine.ledger()) == (0, 1, 30)

    @pytest.mark.parametrize("pipeline", ["a", "b"], ids=["again", "for another pipeline"])
    def test_a_model_registered_anew_during_its_move_is_not_moved_twice_at_once(self, pipeline: str) -> None:
        engine = Engine()
        model = engine.add("a", "model", 30)
        second_began = threading.Event()

        def register_and_load() -> None:
            engine.offloader.unregister("a")
            engine.offloader.register(pipeline, "model", OTHER, model)
            model.before_move = second_began.set
            engine.offloader.ensure_on_gpu(pipeline)

        with held_open(model, lambda: engine.offloader.ensure_on_gpu("a")):
            job = Job(register_and_load)
            assert not second_began.wait(0.5), "two moves of one model at once"
        job.result()
        assert engine.on_card() == engine.ledger() == 30

    def test_an_eviction_that_began_before_takes_nothing_of_a_pipeline_registered_anew_and_used(self) -> None:
        engine = Engine(units=60)
        first, second = engine.add("a", "first", 30), engine.add("a", "second", 30)
        engine.offloader.ensure_on_gpu("a")

        def start_again() -> None:
            engine.offloader.unregister("a")
            for name, handle in (("first", first), ("second", second)):
                engine.offloader.register("a", name, OTHER, handle)
            engine.offloader.mark_active("a")
            engine.offloader.ensure_on_gpu("a")

        with held_open(first, lambda: engine.offloader.ensure_headroom(60 * UNIT)):
            job = Job(start_again)
            job.wait(0.5)
        job.result()
        assert units_on_card((first, second)) == [30, 30]
        assert engine.on_card() == engine.ledger() == 60

    def test_two_pipelines_out_of_memory_at_once_do_not_wait_for_each_other(self) -> None:
        engine = Engine(units=50)
        handles = [engine.add(name, "model", 30) for name in "ab"]
        both_inside = threading.Barrier(2)
        for handle in handles:
            handle.before_move = partial(_meet, both_inside, [])
        outcomes = []
        for job in [Job(partial(engine.offloader.ensure_on_gpu, name)) for name in "ab"]:
            try:
                outcomes.append(job.result())
            except torch.OutOfMemoryError:
                outcomes.append("out of memory")
        assert 30 * UNIT in outcomes
        assert engine.on_card() == engine.ledger() == 30

    def test_uses_of_many_threads_end_idle(self) -> None:
        engine = Engine()
        model = loaded(engine, "a", 30)

        def use() -> int:
            lost = 0
            for _ in range(200):
                with engine.offloader.using("a"):
                    engine.offloader.ensure_headroom(100 * UNIT)
                    lost += model.bytes_on_card() != 30 * UNIT
            return lost

        with engine.offloader.using("a"):
            jobs = [Job(use) for _ in range(6)]
            assert [job.result() for job in jobs] == [0] * 6
        assert engine.offloader.status()[0].state == "idle"

    def test_ten_threads_and_6500_operations_leave_the_books_equal_to_the_ledger(self) -> None:
        stress = Stress(threads=10, operations=650)
        stress.run()
        assert (sum(stress.done), stress.escaped, stress.seen_off_card) == (6_500, [], [])
        assert min(stress.loads(), stress.unloads(), stress.checks) > 200, "it moved much, and looked at active pipelines often"
        assert stress.together > 20, "moves ran beside one another"
        engine = stress.engine
        assert [pipeline.name for pipeline in engine.offloader.status() if pipeline.state == "active"] == []
        stress.register_all()
        in_books = sum(c.bytes_on_card for p in engine.offloader.status() for c in p.components)
        assert in_books == sum(h.bytes_on_card() for h in stress.all_handles()) == engine.card.booked_bytes
        for name in stress.pipelines:
            engine.offloader.offload_to_cpu(name, release_pins=True)
        assert engine.card.booked_bytes == 0


def _meet(barrier: threading.Barrier, met: list[int]) -> None:
    """Both threads are in the middle of their first move before either goes on."""
    if not met:
        met.append(1)
        with suppress(threading.BrokenBarrierError):
            barrier.wait(PATIENCE)


class Stress:
    """Threads that do at random what callers do. Pipelines 0 to 5 are everybody's; each thread has one more of its own.

    Only its owner unregisters a pipeline: a caller that forgets another's pipeline ends that one's uses.
    """

    SHARED = 6

    def __init__(self, threads: int, operations: int) -> None:
        self.engine = Engine(units=100, threshold=5)
        self.operations = operations
        self.done = [0] * threads
        self.escaped: list[BaseException] = []
        self.seen_off_card: list[str] = []
        self.checks = 0
        self.together = 0
        """Moves that ran beside another one."""
        self._moving = 0
        self._counting = threading.Lock()
        self._start = threading.Barrier(threads)
        self.pipelines: dict[str, dict[str, tuple[ComponentRole, PaperHandle]]] = {}
        for number in range(self.SHARED + threads):
            name = f"p{number}"
            sizes = {"generator": 12 + number, "text_encoder": 6, "vae": 2} if number % 2 else {"model": 7 + number}
            self.pipelines[name] = {
                part: (ComponentRole(part) if part != "model" else OTHER, PaperHandle(self.engine.card, (name, part), n * UNIT))
                for part, n in sizes.items()
            }
        for handle in self.all_handles():
            handle.before_move = self._take_time
        self.register_all()

    def _take_time(self) -> None:
        with self._counting:
            self._moving += 1
            self.together += self._moving > 1
        torch.zeros(1 << 16).clone()  # copying lets other threads run, as a real move does
        with self._counting:
            self._moving -= 1

    def register(self, pipeline: str) -> None:
        for part, (role, handle) in self.pipelines[pipeline].items():
            self.engine.offloader.register(pipeline, part, role, handle)

    def register_all(self) -> None:
        for pipeline in self.pipelines:
            self.register(pipeline)

    def loads(self) -> int:
        return sum(handle.loads for handle in self.all_handles())

    def unloads(self) -> int:
        return sum(handle.unloads for handle in self.all_handles())

    def all_handles(self) -> list[PaperHandle]:
        return [handle for parts in self.pipelines.values() for _, handle in parts.values()]

    def run(self) -> None:
        switch_interval = sys.getswitchinterval()
        # an operation takes less than the usual interval: without this the threads would run one after the other
        sys.setswitchinterval(1e-6)
        try:
            for job in [Job(partial(self._live, number)) for number in range(len(self.done))]:
                job.result()
        finally:
            sys.setswitchinterval(switch_interval)

    def _live(self, number: int) -> None:
        dice, offloader = random.Random(number), self.engine.offloader
        self._start.wait(PATIENCE)
        own = f"p{self.SHARED + number}"
        reachable = [f"p{shared}" for shared in range(self.SHARED)] + [own]
        using: dict[str, bool] = {}
        """Pipelines in use by this thread, and whether they have been brought to the card since."""
        for _ in range(self.operations):
            name = dice.choice(reachable)
            try:
                match dice.randrange(8):
                    case 0:
                        self.register(name)
                    case 1:
                        offloader.ensure_on_gpu(name)
                        if name in using:
                            using[name] = True
                    case 2 if name not in using and len(using) < 2:
                        offloader.mark_active(name)
                        using[name] = False
                    case 2 | 3:
                        if using:
                            offloader.mark_idle(using.popitem()[0])
                    case 4:
                        offloader.offload_to_cpu(name, release_pins=dice.random() < 0.5)
                    case 5:
                        offloader.ensure_headroom(dice.randrange(60) * UNIT + dice.randrange(UNIT))
                    case 6:
                        if own not in using:
                            offloader.offload_to_cpu(own, release_pins=True)
                            offloader.unregister(own)
                            self.register(own)
                    case 7:
                        offloader.status()
            except (torch.OutOfMemoryError, ActivePipelineError):
                pass
            except BaseException as error:
                self.escaped.append(error)
            self._check(using)
            self.done[number] += 1
        for name in using:
            offloader.mark_idle(name)

    def _check(self, using: Mapping[str, bool]) -> None:
        for name, brought in using.items():
            self.checks += brought
            for part, (_, handle) in self.pipelines[name].items():
                if brought and part != "text_encoder" and handle.bytes_on_card() != handle.total_bytes():
                    self.seen_off_card.append(f"{name}: {part}")


def _modules() -> list[str]:
    files = sorted((ROOT / "vram").rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


class TestFixedFaults:
    """Faults that this engine replaces. Each of these fails where one of them is back."""

    @pytest.mark.parametrize(
        "evict",
        [
            lambda offloader: offloader.ensure_headroom(10**9),
            lambda offloader: offloader.offload_to_cpu("a"),
            lambda offloader: offloader.mark_idle("a"),
            lambda offloader: offloader.free_rung(Rung.IDLE_PIPELINES),
            lambda offloader: offloader.evict_below_threshold(),
        ],
        ids=["headroom", "offload", "idle", "recovery", "threshold"],
    )
    def test_evicting_moves_the_weights_not_only_the_record(self, evict: Callable[[VRAMOffloader], object]) -> None:
        placed = Placed()
        offloader = VRAMOffloader(VRAMMonitor(lambda: (placed.card,)), Clock(), 10**9, lambda: None)
        offloader.register("a", "net", GENERATOR, placed.handle)
        placed.handle.load()
        assert placed.card.booked_bytes == placed.bytes
        evict(offloader)
        assert offloader.get_loaded_pipelines() == ()
        placed.must_be_whole(on_card=False)

    def test_evicting_by_a_load_moves_the_weights(self) -> None:
        size = Placed().bytes
        ledger = SimulatedCard(size + size // 2)
        mover, offloader = BookingMover(ledger), VRAMOffloader(VRAMMonitor(lambda: (ledger,)), Clock(), 0, lambda: None)
        handles = {name: TorchModuleHandle(Net(), CARD, mover=mover) for name in "ab"}
        for name, handle in handles.items():
            offloader.register(name, "net", OTHER, handle)
            offloader.ensure_on_gpu(name)
        assert [handle.bytes_on_card() for handle in handles.values()] == [0, size]
        assert ledger.booked_bytes == size

    def test_retries_are_capped(self) -> None:
        refilled = Refilled()
        refilled.first.before_move = failure = refilled.failing(times=4)
        with pytest.raises(torch.OutOfMemoryError):
            refilled.engine.offloader.ensure_on_gpu("a")
        assert failure.attempts == 4, "the fifth attempt would have been a success"

    def test_a_success_gives_all_retries_back(self) -> None:
        refilled = Refilled()
        refilled.first.before_move = first = refilled.failing(times=3)
        refilled.second.before_move = second = refilled.failing(times=3)
        assert refilled.engine.offloader.ensure_on_gpu("a") == 20 * UNIT
        assert (first.attempts, second.attempts) == (4, 4), "six retries in one call, never more than three in a row"

    def test_a_load_asks_room_for_what_is_missing_of_it(self) -> None:
        engine = Engine(units=100)
        idle, big = loaded(engine, "idle", 30), engine.add("big", "model", 60)
        big.load()
        big.unload(10 * UNIT)
        assert engine.card.free_bytes == 20 * UNIT
        assert engine.offloader.ensure_on_gpu("big") == 10 * UNIT
        assert idle.bytes_on_card() == 30 * UNIT, "20 UNITs were free and 10 were missing"

    def test_a_chain_evicts_for_what_is_missing_of_it(self) -> None:
        engine = Engine(units=ENCODING // UNIT + 150)
        idle, encoder = loaded(engine, "idle", 40), loaded(engine, "wan", 100)
        engine.offloader.mark_active("wan")
        answer = engine.monitor.can_fit_chain(
            chain(encoding(planlab.model("umt5", 100))),
            RULES,
            (held("umt5", 100, 100),),
            make_room=engine.offloader.ensure_headroom,
        )
        assert (answer.fits, units_on_card((idle, encoder))) == (True, [40, 100]), "10 UNITs more than it needs were free"

    @pytest.mark.parametrize(
        "force",
        [
            lambda engine: engine.offloader.ensure_headroom(10**15),
            lambda engine: engine.offloader.evict_below_threshold(),
            lambda engine: engine.offloader.ensure_on_gpu("greedy"),
            lambda engine: [engine.offloader.free_rung(rung) for rung in Rung],
            lambda engine: [engine.offloader.free_rung(rung, "greedy") for rung in Rung],
            lambda engine: engine.offloader.offload_to_cpu("busy", release_pins=True),
        ],
        ids=["headroom", "threshold", "another's load", "every rung", "every rung of another", "offload"],
    )
    def test_nothing_evicts_an_active_pipeline(self, force: Callable[[Engine], object]) -> None:
        engine = Engine(units=60, threshold=60)
        parts = engine.add_wan("busy")
        engine.add("greedy", "model", 60)
        engine.offloader.mark_active("busy")
        engine.offloader.ensure_on_gpu("busy")
        engine.offloader.ensure_text_encoder_on_gpu("busy")
        with suppress(torch.OutOfMemoryError, ActivePipelineError):
            force(engine)
        assert units_on_card(parts.values()) == [30, 15, 3]

    @pytest.mark.parametrize("module", _modules())
    def test_a_module_has_every_name_it_uses_and_uses_every_name_it_imports(self, module: str) -> None:
        importlib.import_module(f"vram_headroom.{module}")
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F401,F811,F821,F822,F823", str(file)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_load_get_unload_and_the_budget_check_run_on_this_machine(self) -> None:
        placed = Placed()
        get_vram_offloader().register("fixed-faults", "net", GENERATOR, placed.handle)
        try:
            with get_vram_offloader().using("fixed-faults"):
                assert get_vram_offloader().ensure_on_gpu("fixed-faults") == placed.bytes
                assert "fixed-faults" in get_vram_offloader().get_loaded_pipelines()
            get_vram_offloader().offload_to_cpu("fixed-faults")
            placed.must_be_whole(on_card=False)
            work = chain(encoding(planlab.model("umt5", 1)))
            answer = get_vram_monitor().can_fit_chain(work, RULES, make_room=get_vram_offloader().ensure_headroom)
            assert answer.message
        finally:
            get_vram_offloader().unregister("fixed-faults")
            get_vram_monitor().forget_pipeline("fixed-faults")

    def test_the_peak_survives_clearing(self) -> None:
        monitor = VRAMMonitor(lambda: ())
        monitor.record_video_memory("wan", kv_cache=5, temporal_buffer=3, vae_cache=2)
        cleared = monitor.clear_video_memory("wan")
        assert (cleared.kv_cache, cleared.temporal_buffer, cleared.vae_cache, cleared.peak_runtime) == (0, 0, 0, 10)
        monitor.record_video_memory("wan", kv_cache=4)
        assert monitor.clear_video_memory("wan").peak_runtime == 10
