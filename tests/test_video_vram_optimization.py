"""A video pipeline's parts on a card: found in real WAN classes, placed by policy, moved whole, never lost from the books."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import planlab
import pytest
import tinywan
import torch
from paper import CARD, UNIT, BookingMover, Engine
from torch import nn
from vram_headroom.vram.books import PipelineStatus, UnknownPipelineError
from vram_headroom.vram.components import ComponentRole
from vram_headroom.vram.estimate.caches import video_runtime_overhead
from vram_headroom.vram.handle import Placement, TorchModuleHandle
from vram_headroom.vram.monitor import VRAMMonitor
from vram_headroom.vram.offloader import ActivePipelineError, PlacementError
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.policy import DEFAULT_VIDEO_COMPONENT_POLICIES, HOST_DECIDES, VideoComponentPolicy
from vram_headroom.vram.records import ComponentOffloadRecord, VideoMemoryBreakdown
from vram_headroom.vram.recovery import Rung

GIB, MIB = 1 << 30, 1 << 20
CPU = torch.device("cpu")
PATIENCE = 30.0
"""Seconds after which a thread that should have ended is taken for dead."""

GENERATOR, TEXT, VAE, VISION, OTHER = (
    ComponentRole.GENERATOR,
    ComponentRole.TEXT_ENCODER,
    ComponentRole.VAE,
    ComponentRole.CLIP_VISION,
    ComponentRole.OTHER,
)


class Bench(Engine):
    """An engine for real modules: its card's ledger counts the bytes of their tensors."""

    def __init__(self, units: int = 100, threshold: int = 0) -> None:
        super().__init__(units, threshold)
        self.mover = BookingMover(self.card)

    def handle_of(self, model: Any) -> TorchModuleHandle:
        module = model if isinstance(model, nn.Module) else model.model
        return TorchModuleHandle(module, CARD, CPU, self.mover)

    def put(self, pipeline: str, source: object) -> tuple[str, ...]:
        return self.offloader.register_object(pipeline, source, self.handle_of)

    def booked_bytes(self) -> int:
        return sum(c.bytes_on_card for p in self.offloader.status() for c in p.components)


class Patcher:
    """Shaped like ComfyUI's ModelPatcher."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.load_device = CARD

    def model_size(self) -> int:
        return size_of(self.model)

    def clone(self) -> "Patcher":
        return Patcher(self.model)


class Gate:
    """Holds a move open: the mover waits in the middle until the test lets it go."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._released = threading.Event()

    def __call__(self) -> None:
        self._entered.set()
        assert self._released.wait(PATIENCE)

    def wait_until_entered(self) -> None:
        assert self._entered.wait(PATIENCE), "the move did not begin"

    def release(self) -> None:
        self._released.set()


def size_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def pipeline_of(engine: Engine, name: str) -> PipelineStatus:
    return next(pipeline for pipeline in engine.offloader.status() if pipeline.name == name)


def placements(engine: Engine, pipeline: str) -> dict[str, Placement]:
    return {component.name: component.placement for component in pipeline_of(engine, pipeline).components}


def roles(engine: Engine, pipeline: str) -> dict[str, ComponentRole]:
    return {component.name: component.role for component in pipeline_of(engine, pipeline).components}


def moves(engine: Engine) -> list[tuple[str, str, str, str]]:
    """Each move so far: component, from, to, why."""
    return [(move.component, move.source, move.target, move.reason) for move in engine.offloader.history()]


def fail_with(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"


@torch.no_grad()
def denoise(generator: nn.Module) -> torch.Tensor:
    latents = torch.linspace(-1, 1, 16 * 2 * 4 * 4).reshape(1, 16, 2, 4, 4)
    return generator(latents, torch.tensor([500]), tinywan.encoded_text(), return_dict=False)[0]


@torch.no_grad()
def encode(text_encoder: nn.Module) -> torch.Tensor:
    return text_encoder(torch.tensor([[3, 14, 15, 9, 2, 6]])).last_hidden_state


@torch.no_grad()
def decode(vae: Any) -> torch.Tensor:
    return vae.decode(torch.linspace(-1, 1, 16 * 2 * 2 * 2).reshape(1, 16, 2, 2, 2)).sample


class TestDetection:
    """register_object on the real diffusers classes and on things shaped like others."""

    def test_a_diffusers_wan_pipeline_enters_its_three_models_with_their_own_bytes(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline()
        names = bench.put("wan", pipe)
        components = pipeline_of(bench, "wan").components
        assert set(names) == {"vae", "text_encoder", "transformer"}
        assert names == tuple(component.name for component in components)
        assert {c.name: (c.role, c.bytes, c.bytes_on_card) for c in components} == {
            "vae": (VAE, size_of(pipe.vae), 0),
            "text_encoder": (TEXT, size_of(pipe.text_encoder), 0),
            "transformer": (GENERATOR, size_of(pipe.transformer), 0),
        }

    def test_both_experts_of_wan_2_2_are_generators(self) -> None:
        bench = Bench()
        bench.put("wan", tinywan.pipeline(experts=2))
        assert roles(bench, "wan") == {"vae": VAE, "text_encoder": TEXT, "transformer": GENERATOR, "transformer_2": GENERATOR}

    def test_an_image_to_video_pipeline_has_an_image_encoder_beside_its_text_encoder(self) -> None:
        bench = Bench()
        bench.put("wan", tinywan.image_pipeline())
        assert roles(bench, "wan") == {"vae": VAE, "text_encoder": TEXT, "image_encoder": VISION, "transformer": GENERATOR}

    def test_a_components_manager_enters_what_its_pipeline_would(self) -> None:
        bench, pipe = Bench(), tinywan.image_pipeline()
        bench.put("manager", tinywan.manager_of(pipe.components, "wan"))
        through_the_manager = roles(bench, "manager")
        bench.put("pipeline", pipe)
        assert through_the_manager == roles(bench, "pipeline")

    def test_two_collections_of_one_manager_are_booked_under_names_of_their_own(self) -> None:
        bench, pipe, second = Bench(), tinywan.pipeline(), tinywan.generator(seed=9)
        manager = tinywan.manager_of(pipe.components, "first")
        tinywan.manager_of({"transformer": second}, "second", manager)
        names = bench.put("studio", manager)
        assert len(set(names)) == len(names) == 4
        assert sum(role is GENERATOR for role in roles(bench, "studio").values()) == 2

    def test_a_plain_object_is_read_by_its_attributes(self) -> None:
        bench = Bench()
        plain = SimpleNamespace(vae=nn.Linear(2, 2), generator=nn.Linear(3, 3), text_encoder=nn.Linear(4, 4), steps=20)
        bench.put("mine", plain)
        components = pipeline_of(bench, "mine").components
        assert {c.name: (c.role, c.bytes) for c in components} == {
            "vae": (VAE, 4 * (4 + 2)),
            "generator": (GENERATOR, 4 * (9 + 3)),
            "text_encoder": (TEXT, 4 * (16 + 4)),
        }

    def test_objects_that_carry_a_patcher_enter_the_model_inside(self) -> None:
        bench, generator, encoder, vae = Bench(), tinywan.generator(), tinywan.text_encoder(), tinywan.vae()
        outputs = {
            "model": Patcher(generator),
            "clip": SimpleNamespace(patcher=Patcher(encoder)),
            "vae": SimpleNamespace(patcher=Patcher(vae)),
        }
        bench.put("wan", outputs)
        assert roles(bench, "wan") == {"model": GENERATOR, "clip": TEXT, "vae": VAE}
        assert [bench.offloader.pipeline_of(id(model)) for model in (generator, encoder, vae)] == ["wan"] * 3

    def test_clones_of_a_patcher_are_one_component_however_often_they_come(self) -> None:
        bench, patcher = Bench(), Patcher(tinywan.generator())
        assert len(bench.put("wan", [patcher, patcher.clone()])) == 1
        bench.put("wan", patcher.clone())
        (component,) = pipeline_of(bench, "wan").components
        assert (component.role, component.bytes) == (GENERATOR, size_of(patcher.model))

    def test_the_role_found_brings_its_policy(self) -> None:
        bench = Bench()
        bench.put("wan", tinywan.image_pipeline())
        assert {c.name: c.pinned for c in pipeline_of(bench, "wan").components} == {
            "vae": True,
            "text_encoder": False,
            "image_encoder": False,
            "transformer": False,
        }

    def test_a_text_encoder_shared_by_two_pipelines_is_booked_once_with_the_last(self) -> None:
        bench, first, second = Bench(), tinywan.pipeline(), tinywan.pipeline()
        second.register_modules(text_encoder=first.text_encoder)
        bench.put("first", first)
        bench.put("second", second)
        assert set(roles(bench, "first")) == {"vae", "transformer"}
        assert bench.offloader.pipeline_of(id(first.text_encoder)) == "second"

    def test_a_source_without_a_model_is_refused_by_name_and_enters_nothing(self) -> None:
        bench = Bench()
        with pytest.raises(ValueError, match="no model was found in SimpleNamespace"):
            bench.put("wan", SimpleNamespace(steps=20, sampler="euler"))
        assert bench.offloader.status() == ()


class TestPolicies:
    """Who may leave, when, and in which order."""

    @pytest.mark.parametrize(
        ("role", "pinned", "idle", "between"),
        [
            (VAE, True, False, False),
            (TEXT, False, True, True),
            (GENERATOR, False, True, False),
            (VISION, False, True, True),
            (OTHER, False, False, False),
        ],
    )
    def test_every_role_has_a_default(self, role: ComponentRole, pinned: bool, idle: bool, between: bool) -> None:
        policy = DEFAULT_VIDEO_COMPONENT_POLICIES[role]
        assert (policy.pin_to_gpu, policy.offload_when_idle, policy.offload_between_uses) == (pinned, idle, between)
        assert policy.host_decides is False

    def test_no_role_is_without_a_default_and_no_default_can_be_swapped(self) -> None:
        assert set(DEFAULT_VIDEO_COMPONENT_POLICIES) == set(ComponentRole)
        mapping: Any = DEFAULT_VIDEO_COMPONENT_POLICIES
        with pytest.raises(TypeError):
            mapping[VAE] = VideoComponentPolicy()

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"pin_to_gpu": True, "offload_when_idle": True}, "pinned"),
            ({"pin_to_gpu": True, "offload_between_uses": True}, "pinned"),
            ({"host_decides": True, "pin_to_gpu": True}, "host decides"),
            ({"host_decides": True, "offload_when_idle": True}, "host decides"),
            ({"host_decides": True, "offload_between_uses": True}, "host decides"),
        ],
    )
    def test_a_contradiction_is_refused_with_its_reason(self, fields: dict[str, bool], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            VideoComponentPolicy(**fields)

    def test_what_the_host_decides_nothing_moves(self) -> None:
        engine = Engine(units=50)
        encoder = engine.add("wan", "encoder", 10, TEXT, HOST_DECIDES)
        generator = engine.add("wan", "generator", 10, GENERATOR, HOST_DECIDES)
        generator.load()
        offloader = engine.offloader
        with offloader.using("wan"):
            assert offloader.ensure_on_gpu("wan") == 0
            assert offloader.ensure_text_encoder_on_gpu("wan") == 0
        assert offloader.offload_text_encoder("wan") == 0
        assert offloader.offload_to_cpu("wan", release_pins=True) == 0
        assert offloader.ensure_headroom(50 * UNIT) == 0
        assert [offloader.free_rung(rung, "wan") for rung in Rung] == [0] * len(Rung)
        assert (encoder.bytes_on_card(), generator.bytes_on_card(), offloader.history()) == (0, 10 * UNIT, ())

    @pytest.mark.parametrize("role", [VAE, GENERATOR, TEXT])
    def test_elastic_weights_are_the_hosts_whatever_their_role(self, role: ComponentRole) -> None:
        engine = Engine(units=20, threshold=20)
        handle = engine.add("wan", "elastic", 10, role, elastic=True)
        handle.load()
        with engine.offloader.using("wan"):
            pass
        assert engine.offloader.evict_below_threshold() == 0
        assert [(c.placement, c.pinned) for c in pipeline_of(engine, "wan").components] == [("gpu", False)]

    def test_an_elastic_model_leaves_by_no_threshold_even_when_its_policy_says_so(self) -> None:
        engine = Engine(units=20, threshold=20)
        handle = engine.add("wan", "elastic", 10, GENERATOR, VideoComponentPolicy(offload_when_idle=True), elastic=True)
        handle.load()
        engine.offloader.mark_idle("wan")
        assert handle.bytes_on_card() == 10 * UNIT

    def test_a_policy_of_ones_own_goes_before_the_default(self) -> None:
        engine = Engine()
        engine.add("wan", "generator", 30, GENERATOR, VideoComponentPolicy(pin_to_gpu=True))
        engine.add("wan", "vae", 3, VAE, VideoComponentPolicy(offload_when_idle=True))
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
        assert placements(engine, "wan") == {"generator": "gpu", "vae": "cpu"}

    def test_of_those_that_may_leave_the_lowest_priority_leaves_first(self) -> None:
        engine = Engine(units=30)
        for name, priority in (("late", 5), ("early", 1), ("middle", 3)):
            engine.add("p", name, 10, OTHER, VideoComponentPolicy(priority=priority))
        engine.offloader.ensure_on_gpu("p")
        assert engine.offloader.ensure_headroom(20 * UNIT) == 20 * UNIT
        assert placements(engine, "p") == {"late": "gpu", "early": "cpu", "middle": "cpu"}

    def test_by_default_the_text_encoder_makes_room_before_the_generator(self) -> None:
        engine = Engine(units=50)
        engine.add_wan("wan")
        engine.offloader.ensure_on_gpu("wan")
        engine.offloader.ensure_text_encoder_on_gpu("wan")
        engine.offloader.ensure_headroom(17 * UNIT)
        assert placements(engine, "wan") == {"generator": "gpu", "text_encoder": "cpu", "vae": "gpu"}

    def test_an_unknown_part_stays_when_idle_and_leaves_for_others(self) -> None:
        engine = Engine(units=10)
        engine.add("p", "upscaler", 10)
        with engine.offloader.using("p"):
            engine.offloader.ensure_on_gpu("p")
        assert placements(engine, "p") == {"upscaler": "gpu"}
        assert engine.offloader.ensure_headroom(10 * UNIT) == 10 * UNIT


class TestPins:
    """What is pinned leaves on the last rung, or when it is told to."""

    @pytest.fixture
    def engine(self) -> Engine:
        """An idle WAN pipeline all of which is on a card of 50 that has 2 left."""
        engine = Engine(units=50)
        engine.add_wan("wan")
        engine.offloader.ensure_on_gpu("wan")
        engine.offloader.ensure_text_encoder_on_gpu("wan")
        assert engine.ledger() == 48
        return engine

    def test_the_threshold_does_not_move_a_pin(self, engine: Engine) -> None:
        engine.offloader.threshold = 50 * UNIT
        assert engine.offloader.evict_below_threshold() == 45 * UNIT
        assert placements(engine, "wan") == {"generator": "cpu", "text_encoder": "cpu", "vae": "gpu"}

    def test_headroom_that_only_a_pin_could_give_is_not_given(self, engine: Engine) -> None:
        assert engine.offloader.ensure_headroom(48 * UNIT) == 45 * UNIT
        assert (engine.card.free_bytes, engine.ledger()) == (47 * UNIT, 3)

    def test_going_idle_leaves_the_pin_alone_on_the_card(self, engine: Engine) -> None:
        engine.offloader.mark_active("wan")
        engine.offloader.mark_idle("wan")
        assert placements(engine, "wan") == {"generator": "cpu", "text_encoder": "cpu", "vae": "gpu"}

    def test_offloading_a_pipeline_leaves_its_pin(self, engine: Engine) -> None:
        assert engine.offloader.offload_to_cpu("wan") == 45 * UNIT
        assert engine.offloader.offload_to_cpu("wan") == 0
        assert (placements(engine, "wan")["vae"], engine.ledger()) == ("gpu", 3)

    def test_offloading_with_release_pins_takes_everything(self, engine: Engine) -> None:
        assert engine.offloader.offload_to_cpu("wan", release_pins=True) == 48 * UNIT
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("offloaded", 0)

    def test_release_pins_does_not_make_an_active_pipeline_leave(self, engine: Engine) -> None:
        with engine.offloader.using("wan"):
            with pytest.raises(ActivePipelineError, match="pipeline wan is in use"):
                engine.offloader.offload_to_cpu("wan", release_pins=True)
            assert engine.ledger() == 48

    @pytest.mark.parametrize("rung", [Rung.CACHE, Rung.IDLE_PIPELINES, Rung.TEXT_ENCODER, Rung.PART_OF_GENERATOR])
    @pytest.mark.parametrize("owner", ["wan", None])
    def test_no_rung_but_the_last_moves_a_pin(self, engine: Engine, rung: Rung, owner: str | None) -> None:
        before = engine.ledger()
        freed = engine.offloader.free_rung(rung, owner)
        assert freed // UNIT == before - engine.ledger()
        assert placements(engine, "wan")["vae"] == "gpu"

    def test_the_last_rung_takes_the_pin_of_the_pipeline_that_ran_out(self, engine: Engine) -> None:
        engine.offloader.mark_active("wan")
        assert engine.offloader.free_rung(Rung.PINS, "wan") == 3 * UNIT
        assert placements(engine, "wan")["vae"] == "cpu"

    def test_the_last_rung_takes_pins_of_idle_pipelines_and_none_of_active_ones(self) -> None:
        engine = Engine()
        for name in ("idle", "active"):
            engine.add_wan(name)
            engine.offloader.ensure_components_on_gpu(name, (VAE,))
        engine.offloader.mark_active("active")
        assert engine.offloader.free_rung(Rung.PINS) == 3 * UNIT
        assert (placements(engine, "idle")["vae"], placements(engine, "active")["vae"]) == ("cpu", "gpu")

    def test_a_load_that_nothing_else_makes_room_for_takes_the_pin_of_an_idle_pipeline(self) -> None:
        engine = Engine(units=50)
        engine.add_wan("idle", vae=10)
        engine.offloader.ensure_on_gpu("idle")
        engine.add("next", "generator", 45, GENERATOR)
        assert engine.offloader.ensure_on_gpu("next") == 45 * UNIT
        assert placements(engine, "idle") == {"generator": "cpu", "text_encoder": "cpu", "vae": "cpu"}
        assert engine.ledger() == 45

    def test_a_load_that_eviction_makes_room_for_takes_no_pin(self) -> None:
        engine = Engine(units=50)
        vae = engine.add_wan("idle", vae=10)["vae"]
        engine.offloader.ensure_on_gpu("idle")
        engine.add("next", "generator", 40, GENERATOR)
        engine.offloader.ensure_on_gpu("next")
        assert (vae.unloads, engine.ledger()) == (0, 50)

    def test_a_pin_that_left_comes_back_with_its_pipeline(self, engine: Engine) -> None:
        engine.offloader.free_rung(Rung.PINS)
        assert engine.offloader.ensure_on_gpu("wan") == 3 * UNIT
        assert placements(engine, "wan")["vae"] == "gpu"

    def test_every_tensor_of_a_real_pinned_vae_stays_through_idle_and_offload(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline()
        bench.put("wan", pipe)
        with bench.offloader.using("wan"):
            bench.offloader.ensure_on_gpu("wan")
        bench.offloader.offload_to_cpu("wan")
        assert all(bench.mover.is_on(tensor.data, CARD) for tensor in pipe.vae.parameters())
        assert bench.card.booked_bytes == bench.booked_bytes() == size_of(pipe.vae)


class TestTextEncoderRoundTrip:
    """It leaves after the prompt is encoded, while the pipeline samples, and comes back for the next one."""

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        """An active WAN pipeline, all of it on a card of 100."""
        engine = Engine()
        engine.add_wan("wan")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            engine.offloader.ensure_text_encoder_on_gpu("wan")
            yield engine

    def test_it_alone_leaves_though_the_pipeline_is_active(self, engine: Engine) -> None:
        assert engine.offloader.offload_text_encoder("wan") == 15 * UNIT
        assert placements(engine, "wan") == {"generator": "gpu", "text_encoder": "cpu", "vae": "gpu"}
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("active", 33)

    def test_it_alone_comes_back(self, engine: Engine) -> None:
        engine.offloader.offload_text_encoder("wan")
        assert engine.offloader.ensure_text_encoder_on_gpu("wan") == 15 * UNIT
        assert moves(engine)[-2:] == [("text_encoder", "gpu", "cpu", "between uses"), ("text_encoder", "cpu", "gpu", "asked")]
        assert engine.ledger() == 48

    def test_asking_twice_moves_once(self, engine: Engine) -> None:
        engine.offloader.offload_text_encoder("wan")
        so_far = len(engine.offloader.history())
        assert engine.offloader.offload_text_encoder("wan") == 0
        engine.offloader.ensure_text_encoder_on_gpu("wan")
        assert engine.offloader.ensure_text_encoder_on_gpu("wan") == 0
        assert len(engine.offloader.history()) == so_far + 1

    def test_a_pinned_text_encoder_stays(self) -> None:
        engine = Engine()
        engine.add("wan", "text_encoder", 15, TEXT, VideoComponentPolicy(pin_to_gpu=True))
        engine.offloader.ensure_text_encoder_on_gpu("wan")
        assert engine.offloader.offload_text_encoder("wan") == 0
        assert placements(engine, "wan") == {"text_encoder": "gpu"}

    def test_every_text_encoder_leaves_and_the_image_encoder_does_not(self) -> None:
        engine = Engine()
        for name, role in (("t5", TEXT), ("clip_l", TEXT), ("clip_vision", VISION)):
            engine.add("wan", name, 10, role)
        engine.offloader.ensure_components_on_gpu("wan", (TEXT, VISION))
        assert engine.offloader.offload_text_encoder("wan") == 20 * UNIT
        assert placements(engine, "wan") == {"t5": "cpu", "clip_l": "cpu", "clip_vision": "gpu"}

    def test_a_pipeline_without_one_has_nothing_to_move(self) -> None:
        engine = Engine()
        engine.add("upscale", "upscaler", 10)
        assert engine.offloader.ensure_text_encoder_on_gpu("upscale") == 0
        assert engine.offloader.offload_text_encoder("upscale") == 0

    def test_a_pipeline_nobody_registered_is_named(self) -> None:
        for ask in (Engine().offloader.offload_text_encoder, Engine().offloader.ensure_text_encoder_on_gpu):
            with pytest.raises(UnknownPipelineError, match="'wam'"):
                ask("wam")

    def test_its_return_makes_an_idle_pipeline_leave(self) -> None:
        engine = Engine(units=60)
        engine.add_wan("wan")
        engine.add("neighbour", "upscaler", 20)
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            engine.offloader.ensure_on_gpu("neighbour")
            assert engine.offloader.ensure_text_encoder_on_gpu("wan") == 15 * UNIT
        assert moves(engine)[3][:2] == ("upscaler", "gpu")

    def test_on_a_card_its_own_generator_fills_part_of_the_generator_makes_room(self) -> None:
        engine = Engine(units=50)
        engine.add_wan("wan", generator=40, text_encoder=20)
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            assert engine.offloader.ensure_text_encoder_on_gpu("wan") == 20 * UNIT
            assert placements(engine, "wan") == {"generator": "partial", "text_encoder": "gpu", "vae": "gpu"}
            assert engine.ledger() == 20 + 20 + 3

    def test_a_real_umt5_encodes_the_same_after_each_of_three_trips(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline()
        bench.put("wan", pipe)
        expected = encode(pipe.text_encoder)
        with bench.offloader.using("wan"):
            for _ in range(3):
                assert bench.offloader.ensure_text_encoder_on_gpu("wan") == size_of(pipe.text_encoder)
                assert bench.card.booked_bytes == size_of(pipe.text_encoder)
                assert torch.equal(encode(pipe.text_encoder), expected)
                assert bench.offloader.offload_text_encoder("wan") == size_of(pipe.text_encoder)
                assert bench.card.booked_bytes == 0
                assert torch.equal(encode(pipe.text_encoder), expected)

    def test_a_tied_embedding_is_moved_and_counted_once_and_stays_tied(self) -> None:
        bench, encoder = Bench(), tinywan.text_encoder()
        bench.put("wan", {"text_encoder": encoder})
        bench.offloader.ensure_text_encoder_on_gpu("wan")
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        assert len(bench.card.bookings) == len(list(encoder.parameters()))
        assert bench.card.booked_bytes == size_of(encoder)


class TestIdleOffloadAndReload:
    """mark_idle sends away what an idle pipeline does not need; the next use gets the same numbers from it."""

    def test_generator_and_text_encoder_leave_when_the_use_ends(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            engine.offloader.ensure_text_encoder_on_gpu("wan")
            assert engine.ledger() == 48
        assert placements(engine, "wan") == {"generator": "cpu", "text_encoder": "cpu", "vae": "gpu"}
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("idle", 3)
        assert moves(engine)[3:] == [("generator", "gpu", "cpu", "idle"), ("text_encoder", "gpu", "cpu", "idle")]

    def test_only_the_last_of_several_uses_ends_the_use(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.offloader.mark_active("wan")
        engine.offloader.mark_active("wan")
        engine.offloader.ensure_on_gpu("wan")
        engine.offloader.mark_idle("wan")
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("active", 33)
        engine.offloader.mark_idle("wan")
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("idle", 3)

    def test_an_end_without_a_use_takes_nothing_from_the_next_use(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.offloader.mark_idle("wan")
        engine.offloader.mark_active("wan")
        engine.offloader.ensure_on_gpu("wan")
        assert engine.offloader.ensure_headroom(100 * UNIT) == 0
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("active", 33)

    def test_a_use_that_begins_while_others_are_evicted_keeps_its_pipeline(self) -> None:
        engine = Engine(units=20)
        first, second = engine.add("first", "upscaler", 10), engine.add("second", "upscaler", 10)
        engine.offloader.ensure_on_gpu("first")
        engine.offloader.ensure_on_gpu("second")
        first.before_move = lambda: engine.offloader.mark_active("second")
        assert engine.offloader.ensure_headroom(20 * UNIT) == 10 * UNIT
        assert (first.bytes_on_card(), second.bytes_on_card()) == (0, 10 * UNIT)

    def test_a_use_that_fails_ends_like_any_other(self) -> None:
        engine = Engine()
        engine.add_wan("wan")

        def sample() -> None:
            with engine.offloader.using("wan"):
                engine.offloader.ensure_on_gpu("wan")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            sample()
        assert (pipeline_of(engine, "wan").state, engine.ledger()) == ("idle", 3)

    def test_a_pipeline_without_a_pin_is_offloaded_when_idle(self) -> None:
        engine = Engine()
        engine.add("wan", "generator", 30, GENERATOR)
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
        assert (pipeline_of(engine, "wan").state, engine.offloader.get_loaded_pipelines()) == ("offloaded", ())

    def test_going_idle_moves_nothing_of_other_pipelines_while_there_is_room(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.add_wan("other")
        engine.offloader.ensure_on_gpu("other")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
        assert placements(engine, "other") == {"generator": "gpu", "text_encoder": "cpu", "vae": "gpu"}

    def test_going_idle_looks_at_the_threshold(self) -> None:
        engine = Engine(units=30)
        engine.add("p", "upscaler", 20)
        with engine.offloader.using("p"):
            engine.offloader.ensure_on_gpu("p")
            engine.offloader.threshold = 15 * UNIT
            assert engine.offloader.evict_below_threshold() == 0
        assert engine.card.free_bytes >= 15 * UNIT

    def test_what_left_is_measured(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        with engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
        record = engine.monitor.pipeline_record("wan")
        assert record is not None
        assert (record.load_delta, record.unload_delta) == (33 * UNIT, 30 * UNIT)
        assert dict(record.components) == {"generator": 0, "vae": 3 * UNIT}

    def test_a_real_wan_transformer_denoises_the_same_before_and_after(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline()
        bench.put("wan", pipe)
        expected = denoise(pipe.transformer)
        with bench.offloader.using("wan"):
            bench.offloader.ensure_on_gpu("wan")
            assert torch.equal(denoise(pipe.transformer), expected)
        assert placements(bench, "wan")["transformer"] == "cpu"
        assert torch.equal(denoise(pipe.transformer), expected)
        with bench.offloader.using("wan"):
            assert bench.offloader.ensure_on_gpu("wan") == size_of(pipe.transformer)
            assert torch.equal(denoise(pipe.transformer), expected)

    def test_a_real_vae_decodes_the_same_after_its_pin_was_released(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline()
        bench.put("wan", pipe)
        expected = decode(pipe.vae)
        bench.offloader.ensure_on_gpu("wan")
        assert torch.equal(decode(pipe.vae), expected)
        bench.offloader.offload_to_cpu("wan", release_pins=True)
        assert bench.card.booked_bytes == 0
        assert torch.equal(decode(pipe.vae), expected)

    def test_both_experts_make_the_same_video_after_idle_and_reload(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline(experts=2)
        bench.put("wan", pipe)
        expected = tinywan.make_video(pipe)
        for _ in range(2):
            with bench.offloader.using("wan"):
                bench.offloader.ensure_on_gpu("wan")
                assert torch.equal(tinywan.make_video(pipe), expected)
            assert bench.card.booked_bytes == size_of(pipe.vae)


class TestReload:
    """A video pipeline comes back part by part; any other comes back whole."""

    def test_a_wan_pipeline_comes_without_its_text_encoder(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        assert engine.offloader.ensure_on_gpu("wan") == 33 * UNIT
        assert placements(engine, "wan") == {"generator": "gpu", "text_encoder": "cpu", "vae": "gpu"}

    def test_a_real_image_to_video_pipeline_comes_without_both_encoders(self) -> None:
        bench, pipe = Bench(), tinywan.image_pipeline()
        bench.put("wan", pipe)
        assert bench.offloader.ensure_on_gpu("wan") == size_of(pipe.transformer) + size_of(pipe.vae)
        assert bench.card.booked_bytes == size_of(pipe.transformer) + size_of(pipe.vae)
        assert placements(bench, "wan") == {"vae": "gpu", "text_encoder": "cpu", "image_encoder": "cpu", "transformer": "gpu"}

    def test_both_experts_come(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.add("wan", "low_noise", 30, GENERATOR)
        assert engine.offloader.ensure_on_gpu("wan") == 63 * UNIT
        assert placements(engine, "wan")["text_encoder"] == "cpu"

    def test_after_idle_only_the_generator_is_brought(self) -> None:
        engine = Engine()
        wan = engine.add_wan("wan")
        for _ in range(3):
            with engine.offloader.using("wan"):
                engine.offloader.ensure_on_gpu("wan")
        assert (wan["generator"].loads, wan["vae"].loads, wan["text_encoder"].loads) == (3, 1, 0)

    def test_a_generator_of_which_a_part_left_gets_that_part_only(self) -> None:
        engine = Engine(units=40)
        engine.add_wan("wan")
        engine.offloader.ensure_on_gpu("wan")
        engine.offloader.ensure_headroom(17 * UNIT)
        assert placements(engine, "wan")["generator"] == "partial"
        assert engine.offloader.ensure_on_gpu("wan") == 10 * UNIT

    def test_what_is_there_already_is_not_moved_again(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.offloader.ensure_on_gpu("wan")
        assert engine.offloader.ensure_on_gpu("wan") == 0
        assert len(engine.offloader.history()) == 2

    @pytest.mark.parametrize(
        ("wanted", "units"),
        [((VAE,), 3), ((GENERATOR,), 30), ((GENERATOR, TEXT), 45), ((VISION,), 0), ((), 0)],
        ids=["vae", "generator", "generator and text encoder", "one it has not", "none"],
    )
    def test_only_the_roles_asked_for_come(self, wanted: tuple[ComponentRole, ...], units: int) -> None:
        engine = Engine()
        engine.add_wan("wan")
        assert engine.offloader.ensure_components_on_gpu("wan", wanted) == units * UNIT
        on_card = {component.role for component in pipeline_of(engine, "wan").components if component.placement == "gpu"}
        assert (on_card, engine.ledger()) == (set(wanted) - {VISION}, units)

    @pytest.mark.parametrize(
        "parts",
        [(TEXT,), (TEXT, VAE), (GENERATOR, VISION), (OTHER, OTHER)],
        ids=["text encoder", "text encoder and vae", "generator and image encoder", "unknown parts"],
    )
    def test_what_is_no_video_pipeline_comes_whole(self, parts: tuple[ComponentRole, ...]) -> None:
        engine = Engine()
        for number, role in enumerate(parts):
            engine.add("p", f"part {number}", 10, role)
        assert engine.offloader.ensure_on_gpu("p") == len(parts) * 10 * UNIT
        assert set(placements(engine, "p").values()) == {"gpu"}

    def test_an_extra_part_of_a_video_pipeline_comes_with_it(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        engine.add("wan", "controlnet", 5)
        engine.offloader.ensure_on_gpu("wan")
        assert placements(engine, "wan") == {"generator": "gpu", "text_encoder": "cpu", "vae": "gpu", "controlnet": "gpu"}

    def test_room_is_made_for_what_is_missing_only(self) -> None:
        engine = Engine(units=60)
        wan = engine.add_wan("wan")
        engine.add("neighbour", "upscaler", 25)
        engine.offloader.ensure_on_gpu("wan")
        wan["generator"].unload(10 * UNIT)
        engine.offloader.ensure_on_gpu("neighbour")
        assert engine.offloader.ensure_on_gpu("wan") == 10 * UNIT
        assert (placements(engine, "neighbour"), engine.ledger()) == ({"upscaler": "gpu"}, 58)


class TestVideoMemory:
    """What a video holds beside weights: now, and the most there ever was."""

    def test_a_record_tells_its_parts_and_their_sum(self) -> None:
        now = VRAMMonitor(tuple).record_video_memory("wan", kv_cache=500, temporal_buffer=20, vae_cache=100)
        assert (now.kv_cache, now.temporal_buffer, now.vae_cache) == (500, 20, 100)
        assert (now.current, now.peak_runtime) == (620, 620)

    def test_a_smaller_reading_lowers_the_current_value_and_not_the_peak(self) -> None:
        monitor = VRAMMonitor(tuple)
        monitor.record_video_memory("wan", kv_cache=500)
        monitor.record_video_memory("wan", kv_cache=30)
        assert monitor.video_memory("wan") == VideoMemoryBreakdown(kv_cache=30, peak_runtime=500)

    def test_the_peak_is_of_one_moment_and_no_sum_of_peaks(self) -> None:
        monitor = VRAMMonitor(tuple)
        monitor.record_video_memory("wan", kv_cache=500, vae_cache=10)
        monitor.record_video_memory("wan", kv_cache=10, vae_cache=400)
        assert monitor.video_memory("wan").peak_runtime == 510

    def test_clearing_zeroes_what_is_held_and_keeps_the_peak(self) -> None:
        monitor = VRAMMonitor(tuple)
        monitor.record_video_memory("wan", 500, 20, 100)
        cleared = monitor.clear_video_memory("wan")
        assert cleared == monitor.video_memory("wan") == VideoMemoryBreakdown(0, 0, 0, peak_runtime=620)
        assert monitor.clear_video_memory("wan").peak_runtime == 620

    def test_a_peak_kept_through_clearing_can_still_rise(self) -> None:
        monitor = VRAMMonitor(tuple)
        peaks = []
        for reading in (500, 300, 700):
            peaks.append(monitor.record_video_memory("wan", kv_cache=reading).peak_runtime)
            monitor.clear_video_memory("wan")
        assert peaks == [500, 500, 700]

    def test_pipelines_are_counted_apart(self) -> None:
        monitor = VRAMMonitor(tuple)
        monitor.record_video_memory("first", kv_cache=500)
        monitor.record_video_memory("second", kv_cache=40)
        monitor.clear_video_memory("first")
        assert (monitor.video_memory("first").current, monitor.video_memory("second").current) == (0, 40)

    def test_cards_are_counted_apart(self) -> None:
        monitor = VRAMMonitor(tuple)
        monitor.record_video_memory("wan", kv_cache=500, index=0)
        monitor.record_video_memory("wan", kv_cache=40, index=1)
        monitor.clear_video_memory("wan", index=0)
        assert monitor.video_memory("wan", index=0) == VideoMemoryBreakdown(peak_runtime=500)
        assert monitor.video_memory("wan", index=1) == VideoMemoryBreakdown(kv_cache=40, peak_runtime=40)

    def test_a_pipeline_without_a_video_holds_nothing(self) -> None:
        assert VRAMMonitor(tuple).video_memory("wan") == VideoMemoryBreakdown()
        assert VRAMMonitor(tuple).clear_video_memory("wan") == VideoMemoryBreakdown()

    @pytest.mark.parametrize("field", ["kv_cache", "temporal_buffer", "vae_cache"])
    def test_less_than_nothing_is_refused_and_changes_nothing(self, field: str) -> None:
        monitor = VRAMMonitor(tuple)
        monitor.record_video_memory("wan", 500, 20, 100)
        with pytest.raises(ValueError, match="-1"):
            monitor.record_video_memory("wan", **{field: -1})
        assert monitor.video_memory("wan").current == 620

    def test_forgetting_a_pipeline_forgets_its_peak_on_every_card(self) -> None:
        monitor = VRAMMonitor(tuple)
        for index in (0, 1):
            monitor.record_video_memory("wan", kv_cache=500, index=index)
        monitor.record_video_memory("other", kv_cache=7)
        monitor.forget_pipeline("wan")
        assert [monitor.video_memory("wan", index).peak_runtime for index in (0, 1)] == [0, 0]
        assert monitor.video_memory("other").peak_runtime == 7

    def test_of_readings_by_several_threads_the_highest_is_the_peak(self) -> None:
        monitor = VRAMMonitor(tuple)

        def record(number: int) -> None:
            for reading in range(200):
                monitor.record_video_memory("wan", kv_cache=reading * 4 + number)
                monitor.clear_video_memory("wan")

        finish(*(in_thread(lambda number=number: record(number)) for number in range(4)))
        assert monitor.video_memory("wan") == VideoMemoryBreakdown(peak_runtime=199 * 4 + 3)


TIERS = [(416, 240), (832, 480), (960, 544), (1280, 720), (1920, 1088)]
"""Sizes that WAN videos are made at, ascending."""


class TestRuntimeOverhead:
    """estimate_video_runtime_overhead_gb against the caches that causal WAN pipelines were traced to keep."""

    @pytest.mark.parametrize(
        ("width", "height", "frames", "gib"),
        [(832, 480, 81, 5.62), (832, 480, 121, 8.30), (1280, 720, 81, 12.98), (1280, 720, 121, 19.16)],
    )
    def test_the_causal_1_3b_keeps_keys_and_values_of_the_whole_clip(
        self, width: int, height: int, frames: int, gib: float
    ) -> None:
        cross_attention = 90 * MIB
        kept = video_runtime_overhead(width=width, height=height, frames=frames, causal=True).kv_cache
        assert (kept - cross_attention) / GIB == pytest.approx(gib, abs=0.005)

    def test_keys_and_values_of_the_prompt_are_kept_once_whatever_the_clip(self) -> None:
        one, two = (video_runtime_overhead(width=832, height=480, frames=n, causal=True).kv_cache for n in (1, 5))
        assert one - (two - one) == 90 * MIB

    @pytest.mark.parametrize(("width", "height", "mib"), [(832, 480, 1801), (1280, 720, 4156)])
    def test_a_streaming_vae_keeps_features_by_the_pixel_and_not_by_the_frame(self, width: int, height: int, mib: int) -> None:
        kept = {
            video_runtime_overhead(width=width, height=height, frames=n, pipeline="longlive").vae_cache for n in (5, 81, 121)
        }
        assert len(kept) == 1
        assert kept.pop() / MIB == pytest.approx(mib, abs=1)

    @pytest.mark.parametrize(("width", "height", "gib"), [(832, 480, 5.74), (1280, 720, 13.14)])
    def test_a_causal_video_takes_all_of_these_together(self, width: int, height: int, gib: float) -> None:
        assert VRAMMonitor.estimate_video_runtime_overhead_gb(width, height, 81, causal=True) == pytest.approx(gib, abs=0.005)

    def test_a_video_that_is_no_stream_keeps_its_latents_only(self) -> None:
        plain = video_runtime_overhead(width=832, height=480, frames=81)
        assert (plain.kv_cache, plain.vae_cache) == (0, 0)
        assert plain.temporal_buffer == 12 * 4 * 16 * 21 * 60 * 104
        assert VRAMMonitor.estimate_video_runtime_overhead_gb(832, 480) == plain.total / GIB

    @pytest.mark.parametrize("causal", [False, True])
    def test_a_larger_tier_never_takes_less(self, causal: bool) -> None:
        taken = [VRAMMonitor.estimate_video_runtime_overhead_gb(width, height, 81, causal) for width, height in TIERS]
        assert taken == sorted(set(taken))

    @pytest.mark.parametrize("causal", [False, True])
    def test_a_longer_clip_never_takes_less(self, causal: bool) -> None:
        taken = [VRAMMonitor.estimate_video_runtime_overhead_gb(832, 480, frames, causal) for frames in range(1, 130)]
        assert taken == sorted(taken)
        assert len(set(taken)) == 33

    @pytest.mark.parametrize("causal", [False, True])
    def test_one_more_pixel_never_takes_less(self, causal: bool) -> None:
        wider = [VRAMMonitor.estimate_video_runtime_overhead_gb(width, 480, 81, causal) for width in range(800, 880)]
        higher = [VRAMMonitor.estimate_video_runtime_overhead_gb(832, height, 81, causal) for height in range(440, 520)]
        assert (wider, higher) == (sorted(wider), sorted(higher))

    def test_four_frames_share_one_latent_frame(self) -> None:
        taken = [VRAMMonitor.estimate_video_runtime_overhead_gb(832, 480, frames, True) for frames in (77, 80, 81, 84, 85)]
        assert taken[0] == taken[1] < taken[2] == taken[3] < taken[4]

    @pytest.mark.parametrize(("width", "height"), TIERS)
    def test_a_portrait_takes_what_its_landscape_takes_and_a_stream_more_than_a_plain_video(
        self, width: int, height: int
    ) -> None:
        estimate = VRAMMonitor.estimate_video_runtime_overhead_gb
        assert estimate(width, height, 81, True) == estimate(height, width, 81, True) > estimate(width, height, 81)

    @pytest.mark.parametrize(
        ("size", "named"),
        [((0, 480, 81), "width"), ((832, 0, 81), "height"), ((832, 480, 0), "frames"), ((-832, -480, 81), "width")],
    )
    def test_a_size_that_is_no_video_is_refused_by_name(self, size: tuple[int, int, int], named: str) -> None:
        with pytest.raises(ValueError, match=f"{named} must be from 1 to"):
            VRAMMonitor.estimate_video_runtime_overhead_gb(*size)

    def test_a_chain_that_fits_alone_does_not_fit_beside_a_streams_caches(self) -> None:
        overhead = round(VRAMMonitor.estimate_video_runtime_overhead_gb(1280, 720, 81, causal=True) * GIB)

        def fits(units: int, runtime_overhead: int) -> bool:
            engine = Engine(units)
            card = engine.monitor.card()
            assert card is not None
            chain = build_chain(planlab.two_experts(), planlab.VOCABULARY, planlab.library, planlab.RULES, card)
            return engine.monitor.can_fit_chain(chain, planlab.RULES, runtime_overhead=runtime_overhead).fits

        assert (fits(14_500, 0), fits(14_500, overhead), fits(30_000, overhead)) == (True, False, True)


BAD_TENSOR = "bad tensor"


class TestErrorsInTheMiddleOfAMove:
    """Whatever goes wrong, the model is whole on one side, the books are true, and the error says what happened."""

    @pytest.fixture
    def bench(self) -> Bench:
        """One real generator, registered and still on the CPU."""
        bench = Bench()
        self.generator = tinywan.generator()
        self.tensors = len([*self.generator.parameters(), *self.generator.buffers()])
        self.expected = denoise(self.generator)
        bench.put("wan", {"transformer": self.generator})
        return bench

    def last(self, engine: Engine) -> ComponentOffloadRecord:
        return engine.offloader.history()[-1]

    @pytest.mark.parametrize("where", ["first", "middle", "last"])
    def test_a_load_that_fails_at_any_tensor_is_undone(self, bench: Bench, where: str) -> None:
        bench.mover.fail_at = {"first": 0, "middle": self.tensors // 2, "last": self.tensors - 1}[where]
        with pytest.raises(RuntimeError, match=BAD_TENSOR):
            bench.offloader.ensure_on_gpu("wan")
        assert placements(bench, "wan") == {"transformer": "cpu"}
        assert (bench.card.booked_bytes, bench.card.bookings) == (0, ())
        assert torch.equal(denoise(self.generator), self.expected)

    @pytest.mark.parametrize("where", ["first", "middle", "last"])
    def test_an_unload_that_fails_at_any_tensor_leaves_the_model_on_the_card(self, bench: Bench, where: str) -> None:
        bench.offloader.ensure_on_gpu("wan")
        bench.mover.fail_at = {"first": 0, "middle": self.tensors // 2, "last": self.tensors - 1}[where]
        with pytest.raises(PlacementError, match=r"transformer of pipeline wan could not leave the card.*bad tensor"):
            bench.offloader.offload_to_cpu("wan")
        assert placements(bench, "wan") == {"transformer": "gpu"}
        assert bench.card.booked_bytes == bench.booked_bytes() == size_of(self.generator)
        assert torch.equal(denoise(self.generator), self.expected)

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("bad tensor"), torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt("stop")],
        ids=["bad tensor", "out of memory", "interrupt"],
    )
    def test_the_record_tells_a_failed_load(self, bench: Bench, error: BaseException) -> None:
        bench.mover.error, bench.mover.fail_at = error, 5
        with pytest.raises(type(error)):
            bench.offloader.ensure_on_gpu("wan")
        told = self.last(bench)
        assert (told.pipeline, told.component, told.role) == ("wan", "transformer", GENERATOR)
        assert (told.source, told.target, told.bytes, told.reason) == ("cpu", "cpu", 0, "asked")
        assert told.error == f"{type(error).__name__}: {error}"

    def test_the_record_tells_a_failed_unload(self, bench: Bench) -> None:
        bench.offloader.ensure_on_gpu("wan")
        bench.mover.error, bench.mover.fail_at = MemoryError("no room at home"), 5
        with pytest.raises(PlacementError, match="stays there whole: no room at home") as raised:
            bench.offloader.offload_to_cpu("wan")
        told = self.last(bench)
        assert (told.source, told.target, told.bytes, told.error) == ("gpu", "gpu", 0, "MemoryError: no room at home")
        assert isinstance(raised.value.__cause__, MemoryError)

    def test_the_record_of_a_move_that_went_well_has_no_error(self, bench: Bench) -> None:
        bench.offloader.ensure_on_gpu("wan")
        told = self.last(bench)
        assert (told.source, told.target, told.bytes, told.error) == ("cpu", "gpu", size_of(self.generator), None)
        assert told.seconds > 0

    def test_an_interrupt_passes_through_an_unload_as_it_is(self, bench: Bench) -> None:
        bench.offloader.ensure_on_gpu("wan")
        bench.mover.error, bench.mover.fail_at = KeyboardInterrupt(), 5
        with pytest.raises(KeyboardInterrupt), bench.offloader.using("wan"):
            pass
        assert (pipeline_of(bench, "wan").state, placements(bench, "wan")) == ("idle", {"transformer": "gpu"})
        assert bench.card.booked_bytes == size_of(self.generator)

    def test_after_an_error_the_next_move_goes_through(self, bench: Bench) -> None:
        for _ in range(5):
            bench.mover.fail_at = 7
            with pytest.raises(RuntimeError):
                bench.offloader.ensure_on_gpu("wan")
        other_thread = in_thread(lambda: bench.offloader.ensure_on_gpu("wan"))
        finish(other_thread)
        assert placements(bench, "wan") == {"transformer": "gpu"}
        assert torch.equal(denoise(self.generator), self.expected)

    def test_memory_that_runs_out_in_the_middle_is_met_by_evicting_and_the_same_load_again(self, bench: Bench) -> None:
        neighbour = tinywan.generator(seed=5)
        bench.put("neighbour", {"transformer": neighbour})
        bench.offloader.ensure_on_gpu("neighbour")
        bench.mover.error, bench.mover.fail_at = torch.OutOfMemoryError("CUDA out of memory."), 20
        assert bench.offloader.ensure_on_gpu("wan") == size_of(self.generator)
        story = [(move.pipeline, move.target, move.reason, move.error is None) for move in bench.offloader.history()[1:]]
        assert story == [
            ("wan", "cpu", "asked", False),
            ("neighbour", "cpu", "out of memory", True),
            ("wan", "gpu", "asked", True),
        ]
        assert bench.card.booked_bytes == bench.booked_bytes() == size_of(self.generator)
        assert torch.equal(denoise(self.generator), self.expected)

    def test_memory_that_ran_out_for_good_leaves_every_part_where_it_was(self) -> None:
        engine = Engine(units=20)
        engine.add("wan", "vae", 3, VAE)
        engine.add("wan", "generator", 30, GENERATOR)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            engine.offloader.ensure_on_gpu("wan")
        assert placements(engine, "wan")["generator"] == "cpu"
        assert engine.on_card() == engine.ledger()

    def test_a_part_that_came_before_the_failing_one_is_measured(self) -> None:
        engine = Engine()
        engine.add("wan", "vae", 3, VAE)
        engine.add("wan", "generator", 30, GENERATOR).before_move = fail_with(RuntimeError(BAD_TENSOR))
        with pytest.raises(RuntimeError, match=BAD_TENSOR):
            engine.offloader.ensure_on_gpu("wan")
        record = engine.monitor.pipeline_record("wan")
        assert placements(engine, "wan") == {"vae": "gpu", "generator": "cpu"}
        assert record is not None
        assert record.components["vae"] == 3 * UNIT

    def test_a_part_that_can_not_leave_when_idle_stays_is_named_in_the_log_and_holds_no_other_back(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = Engine()
        wan = engine.add_wan("wan")
        with caplog.at_level(logging.WARNING, "vram_headroom"), engine.offloader.using("wan"):
            engine.offloader.ensure_on_gpu("wan")
            engine.offloader.ensure_text_encoder_on_gpu("wan")
            wan["generator"].before_move = fail_with(RuntimeError(BAD_TENSOR))
        assert placements(engine, "wan") == {"generator": "gpu", "text_encoder": "cpu", "vae": "gpu"}
        assert (engine.on_card(), engine.ledger()) == (33, 33)
        assert "generator of pipeline wan could not leave the card" in caplog.text

    def test_a_victim_that_can_not_leave_is_passed_over_for_the_next(self) -> None:
        engine = Engine(units=40)
        stuck, other = engine.add("stuck", "upscaler", 20), engine.add("other", "upscaler", 20)
        engine.offloader.ensure_on_gpu("stuck")
        engine.offloader.ensure_on_gpu("other")
        stuck.before_move = fail_with(RuntimeError(BAD_TENSOR))
        assert engine.offloader.ensure_headroom(20 * UNIT) == 20 * UNIT
        assert (stuck.bytes_on_card(), other.bytes_on_card()) == (20 * UNIT, 0)

    def test_a_part_that_was_partly_there_is_partly_there_after_a_failed_load(self) -> None:
        engine = Engine()
        generator = engine.add("wan", "generator", 30, GENERATOR)
        engine.offloader.ensure_on_gpu("wan")
        generator.unload(12 * UNIT)
        generator.before_move = fail_with(RuntimeError(BAD_TENSOR))
        with pytest.raises(RuntimeError, match=BAD_TENSOR):
            engine.offloader.ensure_on_gpu("wan")
        assert (self.last(engine).source, self.last(engine).target) == ("partial", "partial")
        assert (engine.on_card(), engine.ledger()) == (18, 18)


THREADS, OPERATIONS = 5, 3_500
PIPELINES = [f"wan {number}" for number in range(THREADS)]


def hammer(seed: int, operate: Callable[[int, random.Random], None], operations: int = OPERATIONS) -> int:
    """`operations` from THREADS threads that begin together. Returns how many were done; raises what one raised."""
    done, errors, begin = [0] * THREADS, [], threading.Barrier(THREADS)

    def work(number: int) -> None:
        rng = random.Random(seed * THREADS + number)
        begin.wait(PATIENCE)
        try:
            for _ in range(operations // THREADS):
                operate(number, rng)
                done[number] += 1
        except BaseException as error:
            errors.append(error)

    finish(*(in_thread(lambda number=number: work(number)) for number in range(THREADS)))
    if errors:
        raise errors[0]
    return sum(done)


class TestStress:
    """Five threads, 3,500 operations, several WAN pipelines: after every run the books and the card's ledger agree."""

    @pytest.mark.parametrize("seed", range(3))
    def test_books_equal_the_ledger_and_no_pinned_vae_ever_left(self, seed: int) -> None:
        engine = Engine(units=THREADS * 48 + 10, threshold=100)
        wans = {name: engine.add_wan(name) for name in PIPELINES}
        for name in PIPELINES:
            engine.offloader.ensure_components_on_gpu(name, (VAE,))
        offloader = engine.offloader

        def operate(number: int, rng: random.Random) -> None:
            mine, other = PIPELINES[number], rng.choice(PIPELINES)
            match rng.randrange(8):
                case 0 | 1:
                    with offloader.using(mine):
                        offloader.ensure_text_encoder_on_gpu(mine)
                        offloader.offload_text_encoder(mine)
                        offloader.ensure_on_gpu(mine)
                        assert wans[mine]["generator"].bytes_on_card() == 30 * UNIT, "an active pipeline was evicted"
                case 2:
                    offloader.ensure_on_gpu(other)
                case 3:
                    offloader.ensure_headroom(rng.randrange(250) * UNIT)
                case 4:
                    offloader.evict_below_threshold()
                case 5:
                    offloader.offload_text_encoder(other)
                case 6:
                    with offloader.using(other):
                        pass
                case _:
                    assert all(c.bytes_on_card <= c.bytes for p in offloader.status() for c in p.components)

        assert hammer(seed, operate) == OPERATIONS
        assert engine.on_card() == engine.ledger()
        assert [wans[name]["vae"].unloads for name in PIPELINES] == [0] * THREADS
        assert {pipeline.state for pipeline in offloader.status()} <= {"idle"}
        assert sum(handle.unloads for wan in wans.values() for handle in wan.values()) > 100, "nothing was evicted"

    @pytest.mark.parametrize("seed", range(2))
    def test_books_equal_the_ledger_on_a_card_too_small_for_all_with_moves_that_fail(self, seed: int) -> None:
        engine = Engine(units=80, threshold=10)
        wans = {name: engine.add_wan(name) for name in PIPELINES}
        offloader, trouble = engine.offloader, random.Random(seed)

        def sometimes() -> None:
            if trouble.randrange(20) == 0:
                raise RuntimeError(BAD_TENSOR)

        for wan in wans.values():
            for handle in wan.values():
                handle.before_move = sometimes
        ran_out = [0] * THREADS

        def operate(number: int, rng: random.Random) -> None:
            name = rng.choice(PIPELINES)
            try:
                match rng.randrange(5):
                    case 0 | 1:
                        with offloader.using(name):
                            offloader.ensure_text_encoder_on_gpu(name)
                            offloader.ensure_on_gpu(name)
                    case 2:
                        offloader.offload_to_cpu(name, release_pins=rng.random() < 0.5)
                    case 3:
                        offloader.free_rung(rng.choice(list(Rung)), name)
                    case _:
                        offloader.ensure_headroom(rng.randrange(90) * UNIT)
            except torch.OutOfMemoryError:
                ran_out[number] += 1
            except ActivePipelineError:
                pass
            except RuntimeError as error:
                if BAD_TENSOR not in str(error):
                    raise

        assert hammer(seed, operate) == OPERATIONS
        assert engine.on_card() == engine.ledger() <= 80
        assert sum(ran_out) > 0, "the card was never too small"
        assert {pipeline.state for pipeline in offloader.status()} <= {"idle", "offloaded"}

    def test_pipelines_come_and_go_while_others_are_used(self) -> None:
        engine = Engine(units=1000)
        offloader, guests = engine.offloader, [0] * THREADS
        for name in PIPELINES:
            engine.add_wan(name)

        def operate(number: int, rng: random.Random) -> None:
            match rng.randrange(3):
                case 0:
                    guest = f"guest {number}"
                    engine.add(guest, "upscaler", 5)
                    offloader.ensure_on_gpu(guest)
                    offloader.offload_to_cpu(guest)
                    guests[number] += offloader.unregister(guest)
                case 1:
                    with offloader.using(PIPELINES[number]):
                        offloader.ensure_on_gpu(PIPELINES[number])
                case _:
                    assert {pipeline.name for pipeline in offloader.status()} >= set(PIPELINES)

        assert hammer(7, operate) == OPERATIONS
        assert sorted(pipeline.name for pipeline in offloader.status()) == PIPELINES
        assert (engine.on_card(), engine.ledger()) == (3 * THREADS, 3 * THREADS)
        assert sum(guests) > 500

    def test_real_models_that_threads_move_about_compute_the_same_to_the_end(self) -> None:
        bench = Bench(units=1)
        pipes = {name: tinywan.pipeline() for name in PIPELINES}
        for name, pipe in pipes.items():
            bench.put(name, pipe)
        offloader = bench.offloader
        noise, words = denoise(pipes[PIPELINES[0]].transformer), encode(pipes[PIPELINES[0]].text_encoder)

        def operate(number: int, rng: random.Random) -> None:
            name, pipe = PIPELINES[number], pipes[PIPELINES[number]]
            with offloader.using(name):
                offloader.ensure_text_encoder_on_gpu(name)
                assert torch.equal(encode(pipe.text_encoder), words), name
                offloader.offload_text_encoder(name)
                offloader.ensure_on_gpu(name)
                assert torch.equal(denoise(pipe.transformer), noise), name
            offloader.ensure_on_gpu(name)
            offloader.ensure_headroom(rng.randrange(MIB))

        assert hammer(0, operate, 30) == 30
        offloader.ensure_headroom(MIB)
        assert bench.booked_bytes() == bench.card.booked_bytes == sum(size_of(pipe.vae) for pipe in pipes.values())


class TestStatus:
    """Every pipeline and component, at any moment, without waiting for a move."""

    def test_it_lists_real_components_with_role_placement_bytes_and_pin(self) -> None:
        bench, pipe = Bench(), tinywan.pipeline()
        bench.put("wan", pipe)
        bench.offloader.ensure_on_gpu("wan")
        listed = {
            c.name: (c.role, c.placement, c.bytes, c.bytes_on_card, c.pinned) for c in pipeline_of(bench, "wan").components
        }
        generator, encoder, vae = size_of(pipe.transformer), size_of(pipe.text_encoder), size_of(pipe.vae)
        assert listed == {
            "transformer": (GENERATOR, "gpu", generator, generator, False),
            "text_encoder": (TEXT, "cpu", encoder, 0, False),
            "vae": (VAE, "gpu", vae, vae, True),
        }

    def test_books_equal_the_ledger_after_every_step_of_a_prompt(self) -> None:
        engine = Engine(units=60)
        offloader = engine.offloader
        engine.add_wan("wan")
        engine.add("upscale", "upscaler", 20)
        steps: list[tuple[Callable[[], object], int, str]] = [
            (lambda: offloader.ensure_on_gpu("upscale"), 20, "offloaded"),
            (lambda: offloader.mark_active("wan"), 20, "active"),
            (lambda: offloader.ensure_text_encoder_on_gpu("wan"), 35, "active"),
            (lambda: offloader.offload_text_encoder("wan"), 20, "active"),
            (lambda: offloader.ensure_on_gpu("wan"), 53, "active"),
            (lambda: offloader.mark_idle("wan"), 23, "idle"),
            (lambda: offloader.offload_to_cpu("upscale"), 3, "idle"),
            (lambda: offloader.offload_to_cpu("wan", release_pins=True), 0, "offloaded"),
        ]
        for step, (act, units, state) in enumerate(steps):
            act()
            assert (engine.on_card(), engine.ledger(), pipeline_of(engine, "wan").state) == (units, units, state), (
                f"step {step}"
            )

    @pytest.mark.parametrize("direction", ["to the card", "off the card"])
    def test_it_is_read_while_a_move_is_held_open(self, direction: str) -> None:
        engine, gate = Engine(), Gate()
        generator = engine.add_wan("wan")["generator"]
        if direction == "off the card":
            engine.offloader.ensure_on_gpu("wan")
        before = placements(engine, "wan")["generator"]
        generator.before_move = gate
        move = engine.offloader.ensure_on_gpu if direction == "to the card" else engine.offloader.offload_to_cpu
        mover = in_thread(lambda: move("wan"))
        gate.wait_until_entered()
        seen: list[Placement] = []
        reader = in_thread(lambda: seen.append(placements(engine, "wan")["generator"]))
        finish(reader)
        assert (seen, mover.is_alive()) == ([before], True)
        gate.release()
        finish(mover)
        assert {before, placements(engine, "wan")["generator"]} == {"cpu", "gpu"}

    def test_others_are_registered_loaded_and_forgotten_while_a_move_is_held_open(self) -> None:
        engine, gate = Engine(), Gate()
        engine.add("slow", "generator", 30, GENERATOR).before_move = gate
        mover = in_thread(lambda: engine.offloader.ensure_on_gpu("slow"))
        gate.wait_until_entered()
        seen: list[object] = []

        def live() -> None:
            engine.add("quick", "upscaler", 10)
            seen.append(engine.offloader.ensure_on_gpu("quick"))
            seen.append(engine.offloader.get_loaded_pipelines())
            seen.append(len(engine.offloader.history()))
            seen.append(engine.offloader.unregister("quick"))

        finish(in_thread(live))
        assert (seen, mover.is_alive()) == ([10 * UNIT, ("quick",), 1, True], True)
        gate.release()
        finish(mover)

    def test_placement_and_bytes_of_a_component_come_from_one_look(self) -> None:
        engine = Engine()
        handle = engine.add("wan", "generator", 30, GENERATOR)
        looks = iter([0, 30 * UNIT, 30 * UNIT, 30 * UNIT])
        handle.bytes_on_card = lambda: next(looks)
        (component,) = pipeline_of(engine, "wan").components
        assert (component.placement == "gpu") == (component.bytes_on_card == 30 * UNIT)

    def test_what_was_read_does_not_change_afterwards(self) -> None:
        engine = Engine()
        engine.add_wan("wan")
        before = engine.offloader.status()
        engine.offloader.ensure_on_gpu("wan")
        assert [component.placement for component in before[0].components] == ["cpu"] * 3
        assert before != engine.offloader.status()

    def test_a_partly_placed_generator_is_called_partial_with_its_bytes(self) -> None:
        engine = Engine(units=40)
        engine.add_wan("wan")
        engine.offloader.ensure_on_gpu("wan")
        engine.offloader.ensure_headroom(17 * UNIT)
        generator = pipeline_of(engine, "wan").components[0]
        assert (generator.placement, generator.bytes_on_card, generator.bytes) == ("partial", 20 * UNIT, 30 * UNIT)

    def test_a_forgotten_pipeline_is_not_listed_and_its_models_stay_where_they_are(self) -> None:
        engine = Engine()
        generator = engine.add_wan("wan")["generator"]
        engine.offloader.ensure_on_gpu("wan")
        assert (engine.offloader.unregister("wan"), engine.offloader.unregister("wan")) == (True, False)
        assert engine.offloader.status() == ()
        assert (generator.bytes_on_card(), engine.ledger()) == (30 * UNIT, 33)

    def test_loaded_pipelines_are_those_with_a_byte_on_the_card(self) -> None:
        engine = Engine()
        engine.add_wan("idle")
        engine.add_wan("cold")
        with engine.offloader.using("idle"):
            engine.offloader.ensure_on_gpu("idle")
        assert [pipeline.name for pipeline in engine.offloader.status()] == ["idle", "cold"]
        assert engine.offloader.get_loaded_pipelines() == ("idle",)

    def test_a_part_whose_model_is_gone_is_not_listed_and_the_rest_still_comes(self) -> None:
        engine = Engine()
        wan = engine.add_wan("wan")
        wan["text_encoder"].alive = False
        assert set(placements(engine, "wan")) == {"generator", "vae"}
        assert engine.offloader.ensure_on_gpu("wan") == 33 * UNIT
