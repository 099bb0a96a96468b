"""Laws of the engine over random sequences: the books equal the ledger, pins and active pipelines stay, nothing deadlocks."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paper import UNIT, Engine, PaperHandle
from vram_headroom.vram.books import HISTORY, UnknownPipelineError
from vram_headroom.vram.components import ComponentRole
from vram_headroom.vram.offloader import ActivePipelineError, PlacementError
from vram_headroom.vram.policy import HOST_DECIDES, VideoComponentPolicy
from vram_headroom.vram.recovery import Rung

WATCHDOG = 10.0
"""Seconds after which threads that have not ended are called deadlocked; they need milliseconds."""


class Part(NamedTuple):
    """One model of the cast below."""

    name: str
    units: int
    role: ComponentRole
    policy: VideoComponentPolicy | None = None

    @property
    def pinned(self) -> bool:
        return self.policy.pin_to_gpu if self.policy is not None else self.role is ComponentRole.VAE


CAST = {
    "wan": (
        Part("generator", 30, ComponentRole.GENERATOR),
        Part("text_encoder", 15, ComponentRole.TEXT_ENCODER),
        Part("vae", 4, ComponentRole.VAE),
    ),
    "other wan": (
        Part("generator", 25, ComponentRole.GENERATOR),
        Part("text_encoder", 15, ComponentRole.TEXT_ENCODER),
        Part("vae", 4, ComponentRole.VAE),
    ),
    "plain": (Part("model", 20, ComponentRole.OTHER), Part("upscaler", 9, ComponentRole.OTHER)),
    "pinned": (Part("model", 12, ComponentRole.OTHER, VideoComponentPolicy(pin_to_gpu=True)),),
    "hosted": (Part("model", 6, ComponentRole.GENERATOR, HOST_DECIDES),),
}
"""Pipelines that want 165 UNITs together."""

CARD_UNITS = 80

Key = tuple[str, str]


class Leaving(NamedTuple):
    """Whom an operation may take bytes from: pins too, and of active pipelines only these."""

    pins: bool = False
    owner: str | None = None
    """This pipeline shrinks itself, active or not."""
    encoder_of: str | None = None
    """Of this one only the text encoder leaves, active or not."""


class EngineMachine(RuleBasedStateMachine):
    """Everything a caller may do, in any order, with moves that fail."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(units=CARD_UNITS, threshold=5)
        self.handles: dict[Key, PaperHandle] = {}
        self.parts: dict[Key, Part] = {}
        self.registered: set[str] = set()
        self.users: Counter[str] = Counter()
        """How often each is in use, registered or not: who registers a pipeline anew does not end its uses."""
        for pipeline, parts in CAST.items():
            for part in parts:
                key = (pipeline, part.name)
                self.handles[key] = PaperHandle(self.engine.card, key, part.units * UNIT)
                self.parts[key] = part

    @initialize()
    def start(self) -> None:
        self.handles["hosted", "model"].load()
        for pipeline in ("wan", "plain", "hosted"):
            self.register(pipeline)

    @rule(pipeline=st.sampled_from(sorted(CAST)))
    def register(self, pipeline: str) -> None:
        with self.nothing_else_leaves(Leaving()):
            for part in CAST[pipeline]:
                handle = self.handles[pipeline, part.name]
                self.engine.offloader.register(pipeline, part.name, part.role, handle, policy=part.policy)
        self.registered.add(pipeline)

    @rule(pipeline=st.sampled_from(sorted(CAST)))
    def unregister(self, pipeline: str) -> None:
        with self.nothing_else_leaves(Leaving()):
            assert self.engine.offloader.unregister(pipeline) == (pipeline in self.registered)
        self.registered.discard(pipeline)

    @precondition(lambda self: self.registered)
    @rule(data=st.data())
    def begin_use(self, data: st.DataObject) -> None:
        pipeline = self.one_of_the_registered(data)
        with self.nothing_else_leaves(Leaving()):
            self.engine.offloader.mark_active(pipeline)
        self.users[pipeline] += 1

    @precondition(lambda self: self.used_and_registered())
    @rule(data=st.data())
    def end_use(self, data: st.DataObject) -> None:
        pipeline = data.draw(st.sampled_from(sorted(self.used_and_registered())))
        self.users[pipeline] -= 1
        with self.nothing_else_leaves(Leaving()):
            self.engine.offloader.mark_idle(pipeline)

    @precondition(lambda self: self.registered)
    @rule(data=st.data(), encoder=st.booleans())
    def bring(self, data: st.DataObject, encoder: bool) -> None:
        pipeline = self.one_of_the_registered(data)
        offloader = self.engine.offloader
        wanted = [
            key
            for key, part in self.parts.items()
            if key[0] == pipeline and part.policy is not HOST_DECIDES and (part.role is ComponentRole.TEXT_ENCODER) == encoder
        ]
        before = self.bytes_now()
        with self.nothing_else_leaves(Leaving(pins=True, owner=pipeline)):
            try:
                moved = (offloader.ensure_text_encoder_on_gpu if encoder else offloader.ensure_on_gpu)(pipeline)
            except (RuntimeError, KeyboardInterrupt):
                assert all(self.handles[key].bytes_on_card() >= before[key] for key in wanted), "nothing brought is given up"
                return
        assert all(self.handles[key].bytes_on_card() == self.handles[key].total_bytes() for key in wanted)
        assert moved == sum(self.handles[key].total_bytes() - before[key] for key in wanted)

    @precondition(lambda self: self.registered)
    @rule(data=st.data())
    def dismiss_encoder(self, data: st.DataObject) -> None:
        pipeline = self.one_of_the_registered(data)
        with self.nothing_else_leaves(Leaving(encoder_of=pipeline)), self.failed_moves_excused():
            self.engine.offloader.offload_text_encoder(pipeline)

    @precondition(lambda self: self.registered)
    @rule(data=st.data(), release_pins=st.booleans())
    def offload(self, data: st.DataObject, release_pins: bool) -> None:
        pipeline = self.one_of_the_registered(data)
        with self.nothing_else_leaves(Leaving(pins=release_pins)), self.failed_moves_excused():
            try:
                self.engine.offloader.offload_to_cpu(pipeline, release_pins)
                assert not self.users[pipeline]
            except ActivePipelineError:
                assert self.users[pipeline]

    @rule(units=st.integers(0, CARD_UNITS + 1), odd=st.integers(0, 3))
    def want_headroom(self, units: int, odd: int) -> None:
        delta, booked = units * UNIT + odd, self.engine.card.booked_bytes
        # below zero where another program took more than was free
        free = self.engine.card.total_bytes - self.engine.card.used_bytes
        with self.nothing_else_leaves(Leaving()), self.failed_moves_excused():
            freed = self.engine.offloader.ensure_headroom(delta)
            assert self.engine.card.booked_bytes == booked - freed
            assert freed <= max(0, delta - free), "a paper model gives up no more than is missing"

    @rule(rung=st.sampled_from(Rung), data=st.data(), owned=st.booleans())
    def recover(self, rung: Rung, data: st.DataObject, owned: bool) -> None:
        owner = self.one_of_the_registered(data) if owned and self.registered else None
        booked = self.engine.card.booked_bytes
        with self.nothing_else_leaves(Leaving(pins=rung is Rung.PINS, owner=owner)), self.failed_moves_excused():
            freed = self.engine.offloader.free_rung(rung, owner)
            assert self.engine.card.booked_bytes == booked - freed

    @rule(
        key=st.sampled_from([(pipeline, part.name) for pipeline, parts in CAST.items() for part in parts]),
        error=st.sampled_from([RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt]),
        times=st.integers(1, 5),
    )
    def let_moves_fail(self, key: Key, error: type[BaseException], times: int) -> None:
        left = [times]

        def fail() -> None:
            if left[0]:
                left[0] -= 1
                raise error("injected")

        self.handles[key].before_move = fail

    @rule(units=st.integers(0, CARD_UNITS // 2))
    def others_take(self, units: int) -> None:
        self.engine.card.set_others(units * UNIT)

    @rule(seconds=st.integers(1, 100))
    def time_passes(self, seconds: int) -> None:
        self.engine.clock.advance(seconds)

    @invariant()
    def the_books_equal_the_ledger(self) -> None:
        in_books = {
            (pipeline.name, component.name): component.bytes_on_card
            for pipeline in self.engine.offloader.status()
            for component in pipeline.components
        }
        registered = {key: held for key, held in self.bytes_now().items() if key[0] in self.registered}
        assert in_books == registered
        forgotten = sum(held for key, held in self.bytes_now().items() if key[0] not in self.registered)
        assert sum(in_books.values()) + forgotten == self.engine.card.booked_bytes

    @invariant()
    def a_pipeline_is_active_exactly_while_it_is_used(self) -> None:
        active = {pipeline.name for pipeline in self.engine.offloader.status() if pipeline.state == "active"}
        assert active == self.used_and_registered()

    @invariant()
    def what_the_host_places_never_moves(self) -> None:
        hosted = self.handles["hosted", "model"]
        assert (hosted.loads, hosted.unloads) in ((0, 0), (1, 0))

    @invariant()
    def the_history_is_bounded_and_failed_moves_moved_nothing(self) -> None:
        history = self.engine.offloader.history()
        assert len(history) <= HISTORY
        assert all(move.bytes == 0 and move.source == move.target for move in history if move.error is not None)

    def one_of_the_registered(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.registered)))

    def used_and_registered(self) -> set[str]:
        return {name for name in self.registered if self.users[name]}

    def bytes_now(self) -> dict[Key, int]:
        return {key: handle.bytes_on_card() for key, handle in self.handles.items()}

    @contextmanager
    def nothing_else_leaves(self, allowed: Leaving) -> Iterator[None]:
        """What loses bytes in the block is idle and not pinned, or `allowed` says that it may."""
        before = self.bytes_now()
        moves = len(self.engine.offloader.history())
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            for (pipeline, name), held in self.bytes_now().items():
                if held >= before[pipeline, name]:
                    continue
                part = self.parts[pipeline, name]
                encoder_asked = allowed.encoder_of == pipeline and part.role is ComponentRole.TEXT_ENCODER
                assert pipeline in self.registered, f"{pipeline} is not registered"
                assert not part.pinned or allowed.pins, f"pinned {name} of {pipeline} left"
                assert not self.users[pipeline] or allowed.owner == pipeline or encoder_asked, (
                    f"{name} of active {pipeline} left"
                )
            assert len(self.engine.offloader.history()) >= min(moves, HISTORY)

    @contextmanager
    def failed_moves_excused(self) -> Iterator[None]:
        """A component that could not be moved, or an interrupt, ends the operation; the books stay true."""
        with suppress(PlacementError, KeyboardInterrupt):
            yield


EngineMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, database=None, derandomize=True
)
TestRandomSequences = EngineMachine.TestCase


class Step(NamedTuple):
    """One call of one thread."""

    kind: str
    pipeline: str
    units: int


STEPS = st.builds(
    Step,
    st.sampled_from(
        [
            "register",
            "unregister",
            "bring",
            "bring",
            "encode",
            "dismiss",
            "use",
            "use",
            "offload",
            "headroom",
            "recover",
            "status",
        ]
    ),
    st.sampled_from(sorted(CAST)),
    st.integers(0, CARD_UNITS),
)


class Callers:
    """Threads that each make their own calls on one engine."""

    def __init__(self) -> None:
        self.engine = Engine(units=CARD_UNITS, threshold=5)
        self.handles = {
            (pipeline, part.name): PaperHandle(self.engine.card, (pipeline, part.name), part.units * UNIT)
            for pipeline, parts in CAST.items()
            for part in parts
        }
        self.escaped: list[BaseException] = []
        for pipeline in CAST:
            self.register(pipeline)

    def register(self, pipeline: str) -> None:
        for part in CAST[pipeline]:
            handle = self.handles[pipeline, part.name]
            self.engine.offloader.register(pipeline, part.name, part.role, handle, policy=part.policy)

    def run(self, sequences: list[list[Step]]) -> None:
        start = threading.Barrier(len(sequences))
        switch_interval = sys.getswitchinterval()

        def live(steps: list[Step]) -> None:
            start.wait(WATCHDOG)
            for step in steps:
                try:
                    self.take(step)
                except (torch.OutOfMemoryError, ActivePipelineError, UnknownPipelineError):
                    pass
                except BaseException as error:
                    self.escaped.append(error)

        threads = [threading.Thread(target=live, args=(steps,), daemon=True) for steps in sequences]
        # a sequence takes less than the usual interval: without this the threads would run one after the other
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WATCHDOG)
        finally:
            sys.setswitchinterval(switch_interval)
        assert not any(thread.is_alive() for thread in threads), "deadlock"

    def take(self, step: Step) -> None:
        offloader = self.engine.offloader
        match step.kind:
            case "register":
                self.register(step.pipeline)
            case "unregister":
                offloader.unregister(step.pipeline)
            case "bring":
                offloader.ensure_on_gpu(step.pipeline)
            case "encode":
                offloader.ensure_text_encoder_on_gpu(step.pipeline)
            case "dismiss":
                offloader.offload_text_encoder(step.pipeline)
            case "use":
                with offloader.using(step.pipeline):
                    offloader.ensure_on_gpu(step.pipeline)
                    offloader.ensure_headroom(step.units * UNIT)
            case "offload":
                offloader.offload_to_cpu(step.pipeline, release_pins=step.units % 2 == 0)
            case "headroom":
                offloader.ensure_headroom(step.units * UNIT)
            case "recover":
                offloader.free_rung(list(Rung)[step.units % len(Rung)], step.pipeline)
            case "status":
                offloader.status()


@given(st.lists(st.lists(STEPS, min_size=5, max_size=30), min_size=2, max_size=4))
@settings(max_examples=80, deadline=None, database=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
def test_no_sequence_of_two_to_four_threads_deadlocks_or_falsifies_the_books(sequences: list[list[Step]]) -> None:
    callers = Callers()
    callers.run(sequences)
    assert callers.escaped == []
    for pipeline in CAST:
        callers.register(pipeline)
    in_books = sum(c.bytes_on_card for p in callers.engine.offloader.status() for c in p.components)
    assert in_books == sum(handle.bytes_on_card() for handle in callers.handles.values()) == callers.engine.card.booked_bytes
