"""The books: who belongs to which pipeline, where it is, and that they keep nothing alive."""

import threading
from dataclasses import dataclass

import pytest
import torch
from paper import UNIT, Engine
from vram_headroom.vram.components import ComponentRole
from vram_headroom.vram.device import MemoryReading
from vram_headroom.vram.monitor import VRAMMonitor
from vram_headroom.vram.offloader import VRAMOffloader, get_vram_offloader


@dataclass
class PaperHandle:
    """A handle whose model is three numbers."""

    key: object
    size: int = 100
    on_card: int = 0
    alive: bool = True
    in_use: bool = False
    elastic: bool = False
    device_index: int = 0

    def total_bytes(self) -> int:
        return self.size

    def bytes_on_card(self) -> int:
        return self.on_card

    def load(self) -> int:
        moved, self.on_card = self.size - self.on_card, self.size
        return moved

    def unload(self, nbytes: int | None = None) -> int:
        freed, self.on_card = self.on_card, 0
        return freed


def test_a_pipeline_lists_its_components_with_placement_bytes_and_role() -> None:
    books = VRAMOffloader()
    books.register("wan", "dit.safetensors", ComponentRole.GENERATOR, PaperHandle("g", 100, 40), node_id="8:3")
    books.register("wan", "umt5.safetensors", ComponentRole.TEXT_ENCODER, PaperHandle("t", 60, 0))
    books.register("wan", "vae.safetensors", ComponentRole.VAE, PaperHandle("v", 10, 10))
    (pipeline,) = books.status()
    assert (pipeline.name, pipeline.state) == ("wan", "idle")
    assert [(c.name, c.role, c.placement, c.bytes, c.bytes_on_card, c.node_id) for c in pipeline.components] == [
        ("dit.safetensors", ComponentRole.GENERATOR, "partial", 100, 40, "8:3"),
        ("umt5.safetensors", ComponentRole.TEXT_ENCODER, "cpu", 60, 0, None),
        ("vae.safetensors", ComponentRole.VAE, "gpu", 10, 10, None),
    ]


def test_a_pipeline_is_active_idle_or_offloaded() -> None:
    books, handle = VRAMOffloader(), PaperHandle("g")
    books.register("wan", "dit", ComponentRole.GENERATOR, handle)
    assert books.status()[0].state == "offloaded"
    assert books.get_loaded_pipelines() == ()
    handle.on_card = 5
    assert books.status()[0].state == "idle"
    assert books.get_loaded_pipelines() == ("wan",)
    handle.in_use = True
    assert books.status()[0].state == "active"


def test_registering_a_model_again_never_doubles_it() -> None:
    books = VRAMOffloader()
    books.register("wan", "old name", ComponentRole.VAE, PaperHandle("v"))
    books.register("wan", "new name", ComponentRole.VAE, PaperHandle("v"))
    assert [component.name for component in books.status()[0].components] == ["new name"]


def test_a_model_that_is_gone_leaves_the_books_by_itself() -> None:
    books, handle = VRAMOffloader(), PaperHandle("g")
    books.register("wan", "dit", ComponentRole.GENERATOR, handle)
    books.register("wan", "vae", ComponentRole.VAE, PaperHandle("v"))
    handle.alive = False
    assert [component.name for component in books.status()[0].components] == ["vae"]
    assert books.pipeline_of("g") is None
    assert books.pipeline_of("v") == "wan"


def test_an_empty_pipeline_disappears() -> None:
    books, handle = VRAMOffloader(), PaperHandle("g")
    books.register("wan", "dit", ComponentRole.GENERATOR, handle)
    handle.alive = False
    assert books.status() == ()
    assert books.unregister("wan") is False


def test_a_pipeline_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        VRAMOffloader().register("  ", "dit", ComponentRole.GENERATOR, PaperHandle("g"))


def test_threads_may_register_and_look_at_once() -> None:
    books = VRAMOffloader()

    def work(number: int) -> None:
        for step in range(100):
            books.register(f"p{number}", f"m{step}", ComponentRole.OTHER, PaperHandle((number, step), on_card=1))
            books.status()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {pipeline.name: len(pipeline.components) for pipeline in books.status()} == {f"p{n}": 100 for n in range(8)}


def test_there_is_one_offloader() -> None:
    assert get_vram_offloader() is get_vram_offloader()


def test_a_pipeline_that_its_host_computes_with_gives_up_nothing() -> None:
    engine = Engine(60)
    parts = engine.add_wan("wan")
    engine.offloader.ensure_on_gpu("wan")
    engine.offloader.ensure_text_encoder_on_gpu("wan")
    parts["generator"].in_use = True
    assert engine.offloader.ensure_headroom(40 * UNIT) == 0
    assert (engine.on_card(), engine.ledger()) == (48, 48)
    parts["generator"].in_use = False
    assert engine.offloader.ensure_headroom(40 * UNIT) == 28 * UNIT
    assert {name: part.bytes_on_card() // UNIT for name, part in parts.items()} == {
        "generator": 17,
        "text_encoder": 0,
        "vae": 3,
    }


class FragmentedCard:
    """A card whose allocator caches blocks that are too small for what is asked next."""

    index = 0
    name = "fragmented"
    kind = "cuda"

    def __init__(self) -> None:
        self.active, self.cached = 0, 40

    def read(self) -> MemoryReading:
        held = self.active + self.cached
        return MemoryReading(total=100, free=100 - held, reserved=held, active=self.active)

    def empty_cache(self) -> None:
        self.cached = 0


def test_cached_blocks_in_the_way_of_a_load_are_given_back_and_it_is_tried_again() -> None:
    card = FragmentedCard()
    handle = PaperHandle("g", size=70)
    loads: list[int] = []

    def load() -> int:
        loads.append(card.cached)
        if card.cached:
            raise torch.OutOfMemoryError("CUDA out of memory")
        card.active = handle.on_card = 70
        return 70

    handle.load = load
    books = VRAMOffloader(VRAMMonitor(lambda: (card,)), threshold=0, cleanup=card.empty_cache)
    books.register("wan", "dit", ComponentRole.GENERATOR, handle)
    assert books.ensure_on_gpu("wan") == 70
    assert loads == [40, 0]


def test_of_two_experts_that_do_not_fit_together_one_makes_room_for_the_other() -> None:
    engine = Engine(100)
    high = engine.add("wan", "high", 70, ComponentRole.GENERATOR)
    low = engine.add("wan", "low", 60, ComponentRole.GENERATOR)
    vae = engine.add("wan", "vae", 4, ComponentRole.VAE)
    with engine.offloader.using("wan"):
        engine.offloader.ensure_components_on_gpu("wan", (ComponentRole.VAE,))
        assert engine.offloader.ensure_components_on_gpu("wan", names=("high",)) == 70 * UNIT
        assert engine.offloader.ensure_components_on_gpu("wan", names=("low",)) == 60 * UNIT
        assert (high.bytes_on_card(), low.bytes_on_card(), vae.bytes_on_card()) == (35 * UNIT, 60 * UNIT, 4 * UNIT)
        assert engine.on_card() == engine.ledger() == 99
