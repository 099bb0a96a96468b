"""Models of paper and a mover that books: every byte an engine test places is on a simulated card's own ledger."""

from collections.abc import Callable

import torch
from vram_headroom.vram.components import ComponentRole
from vram_headroom.vram.device import Booking, SimulatedCard
from vram_headroom.vram.monitor import VRAMMonitor
from vram_headroom.vram.offloader import VRAMOffloader
from vram_headroom.vram.policy import VideoComponentPolicy

UNIT = 1 << 20
CARD = torch.device("cpu", 0)
"""Differs from torch.device("cpu"), though its tensors are ordinary ones: it plays the card."""


class Clock:
    """Seconds that pass only when a test says so, one tick at each look so that no two looks are equal."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class PaperHandle:
    """A model that is nothing but its bytes on `card`. Partly placed when it is told to free a part."""

    def __init__(self, card: SimulatedCard, key: object, nbytes: int, index: int = 0, elastic: bool = False) -> None:
        self._card = card
        self._booking: Booking | None = None
        self._bytes = nbytes
        self.key = key
        self.alive = True
        self.in_use = False
        self.elastic = elastic
        self.device_index = index
        self.before_move: Callable[[], None] = lambda: None
        """Called in the middle of each move: raise here to fail it, wait here to hold it open."""
        self.loads = 0
        self.unloads = 0

    def total_bytes(self) -> int:
        return self._bytes

    def bytes_on_card(self) -> int:
        booking = self._booking
        return booking.nbytes if booking is not None else 0

    def load(self) -> int:
        before = self.bytes_on_card()
        self.before_move()
        if self._booking is None:
            self._booking = self._card.allocate(self._bytes, str(self.key))
        else:
            self._card.resize(self._booking, self._bytes)
        self.loads += 1
        return self._bytes - before

    def unload(self, nbytes: int | None = None) -> int:
        booking = self._booking
        if booking is None:
            return 0
        before = booking.nbytes
        self.before_move()
        left = 0 if nbytes is None else max(0, before - nbytes)
        if left == 0:
            self._booking = None
            self._card.release(booking)
        else:
            self._card.resize(booking, left)
        self.unloads += 1
        return before - left


class BookingMover:
    """Moves real tensors of real modules by copying them, and books the copies that are "on the card"."""

    def __init__(self, card: SimulatedCard) -> None:
        self._card = card
        self._booked: dict[int, Booking] = {}
        self.fail_at: int | None = None
        """Raise at this many moves from now (0: the next one)."""
        self.error: BaseException = RuntimeError("bad tensor")

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self.fail_at is not None:
            if self.fail_at == 0:
                self.fail_at = None
                raise self.error
            self.fail_at -= 1
        booking = self._card.allocate(tensor.nbytes, "tensor") if device == CARD else None
        copy = tensor.clone()
        if booking is not None:
            self._booked[copy.data_ptr()] = booking
        return copy

    def drop(self, tensor: torch.Tensor) -> None:
        booking = self._booked.pop(tensor.data_ptr(), None)
        if booking is not None:
            self._card.release(booking)

    def is_on(self, tensor: torch.Tensor, device: torch.device) -> bool:
        return (tensor.data_ptr() in self._booked) == (device == CARD)


class Engine:
    """A card of `units` UNITs with a monitor and an offloader of its own, and short ways to fill it."""

    def __init__(self, units: int = 100, threshold: int = 0, others: int = 0) -> None:
        self.card = SimulatedCard(units * UNIT, others=others * UNIT, name="paper card")
        self.clock = Clock()
        self.monitor = VRAMMonitor(lambda: (self.card,), clock=self.clock, safety_margin=0)
        self.cleanups = 0
        self.offloader = VRAMOffloader(self.monitor, self.clock, threshold * UNIT, self._clean)

    def _clean(self) -> None:
        self.cleanups += 1

    def add(
        self,
        pipeline: str,
        name: str,
        units: int,
        role: ComponentRole = ComponentRole.OTHER,
        policy: VideoComponentPolicy | None = None,
        elastic: bool = False,
    ) -> PaperHandle:
        """Register one paper model."""
        handle = PaperHandle(self.card, (pipeline, name), units * UNIT, elastic=elastic)
        self.offloader.register(pipeline, name, role, handle, policy=policy)
        return handle

    def add_wan(self, pipeline: str, generator: int = 30, text_encoder: int = 15, vae: int = 3) -> dict[str, PaperHandle]:
        """Register a WAN-shaped pipeline: generator, text encoder and VAE with the default policies."""
        return {
            "generator": self.add(pipeline, "generator", generator, ComponentRole.GENERATOR),
            "text_encoder": self.add(pipeline, "text_encoder", text_encoder, ComponentRole.TEXT_ENCODER),
            "vae": self.add(pipeline, "vae", vae, ComponentRole.VAE),
        }

    def on_card(self) -> int:
        """UNITs on the card by the books: what every component says of itself."""
        return sum(c.bytes_on_card for p in self.offloader.status() for c in p.components) // UNIT

    def ledger(self) -> int:
        """UNITs on the card by the card's own ledger."""
        return self.card.booked_bytes // UNIT
