"""Accelerators behind one small interface: CUDA and ROCm, XPU, MPS, others of torch, none, and a simulated card."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from .peaks import Allocated, PeakCounter
from .units import say_gib


class MemoryReading(NamedTuple):
    """What one card says of its memory right now, in bytes. None: this driver or allocator can't tell."""

    total: int
    free: int
    """Free for anybody: total less what every program holds."""
    reserved: int | None
    """What this process's allocator took from the card, cached blocks included."""
    active: int | None
    """What tensors of this process use."""


class DeviceReadError(RuntimeError):
    """A driver did not answer; the message says which card and why."""


class Accelerator(Protocol):
    """One card. `read` raises DeviceReadError when the driver fails; it allocates nothing on the card."""

    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """`cuda`, `rocm`, `xpu`, `mps`, `simulated`, `host` (only the host can read it), or torch's name for others."""
        ...

    def read(self) -> MemoryReading: ...


class TorchAccelerator:
    """A card that torch drives through `torch.<backend>`: CUDA, ROCm (as `torch.cuda`), XPU and newer ones."""

    def __init__(self, backend: str, index: int) -> None:
        self._backend = backend
        self._index = index
        self._module: Any = getattr(torch, backend)

    @property
    def index(self) -> int:
        return self._index

    @property
    def name(self) -> str:
        describe = getattr(self._module, "get_device_name", None)
        return str(describe(self._index)) if describe else f"{self._backend}:{self._index}"

    @property
    def kind(self) -> str:
        return "rocm" if self._backend == "cuda" and torch.version.hip else self._backend

    def read(self) -> MemoryReading:
        try:
            free, total = self._free_and_total()
            stats: dict[str, int] = self._module.memory_stats(self._index) if hasattr(self._module, "memory_stats") else {}
        except (RuntimeError, AssertionError) as error:
            raise DeviceReadError(f"{self._backend}:{self._index} did not answer a memory query: {error}") from error
        return MemoryReading(
            total=int(total),
            free=int(free),
            reserved=stats.get("reserved_bytes.all.current", 0 if stats else None),
            active=stats.get("active_bytes.all.current", 0 if stats else None),
        )

    def _free_and_total(self) -> tuple[int, int]:
        if hasattr(self._module, "mem_get_info"):
            return self._module.mem_get_info(self._index)
        # torch >= 2.9 offers one call for every backend
        if hasattr(torch.accelerator, "get_memory_info"):
            return torch.accelerator.get_memory_info(self._index)
        total = int(self._module.get_device_properties(self._index).total_memory)
        return total - int(self._module.memory_reserved(self._index)), total


class TorchPeakCounter:
    """The peak counter of torch's allocator on one CUDA or ROCm card. It sees tensors only, no pages of DynamicVRAM."""

    def __init__(self, index: int) -> None:
        self._index = index

    def read(self) -> Allocated:
        # the nested form is the driver's own answer; the flat one sorts hundreds of names for it
        count = torch.cuda.memory_stats_as_nested_dict(self._index).get("allocated_bytes", {}).get("all", {})
        return Allocated(int(count.get("current", 0)), int(count.get("peak", 0)))

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._index)


def peak_counter(card: Accelerator | None) -> PeakCounter | None:
    """The counter of this card's allocator; None where torch keeps none."""
    return TorchPeakCounter(card.index) if card is not None and card.kind in ("cuda", "rocm") else None


class MPSAccelerator:
    """Apple's GPU. Total is Metal's recommended working set, since the memory is the computer's own."""

    index = 0
    name = "Apple GPU"
    kind = "mps"

    def read(self) -> MemoryReading:
        try:
            total = int(torch.mps.recommended_max_memory())
            reserved = int(torch.mps.driver_allocated_memory())
            active = int(torch.mps.current_allocated_memory())
        except RuntimeError as error:
            raise DeviceReadError(f"mps did not answer a memory query: {error}") from error
        return MemoryReading(total=total, free=max(0, total - reserved), reserved=reserved, active=active)


class CallbackAccelerator:
    """A card that only the host application can read, through the function it hands over."""

    def __init__(self, name: str, read: Callable[[], MemoryReading], index: int = 0, kind: str = "host") -> None:
        self._name, self._read, self._index, self._kind = name, read, index, kind

    @property
    def index(self) -> int:
        return self._index

    @property
    def name(self) -> str:
        return self._name

    @property
    def kind(self) -> str:
        return self._kind

    def read(self) -> MemoryReading:
        try:
            return self._read()
        except (RuntimeError, OSError, AttributeError, ValueError) as error:
            raise DeviceReadError(f"{self._name} did not answer a memory query: {error}") from error


class PagedAccelerator:
    """A card whose weights lie in pages beside torch's allocator (DynamicVRAM): its statistics do not see them.

    `used` says what this process holds in all, None where that can't be told just now; `pages` how much of it are weights that
    come and go, by the card's index.
    """

    def __init__(self, card: Accelerator, used: Callable[[], int | None], pages: Callable[[int], int]) -> None:
        self._card, self._used, self._pages = card, used, pages

    @property
    def index(self) -> int:
        return self._card.index

    @property
    def name(self) -> str:
        return self._card.name

    @property
    def kind(self) -> str:
        return self._card.kind

    def read(self) -> MemoryReading:
        reading, used = self._card.read(), self._used()
        if used is None:
            return reading
        # the total counts what torch took from the driver, cached blocks included
        cached = max(0, (reading.reserved or 0) - (reading.active or 0))
        active = max(used - cached, min(used, (reading.active or 0) + self._pages(self.index)))
        return reading._replace(reserved=used, active=active)


class Booking:
    """Bytes booked on a simulated card; changed only through that card."""

    __slots__ = ("live", "nbytes", "owner")

    def __init__(self, nbytes: int, owner: str) -> None:
        self.nbytes = nbytes
        self.owner = owner
        self.live = True

    def __repr__(self) -> str:
        return f"Booking({self.owner!r}, {say_gib(self.nbytes)}{'' if self.live else ', released'})"


class SimulatedCard:
    """A card of paper: a capacity, other programs' memory and bookings. Thread-safe.

    Raises a real `torch.OutOfMemoryError` when a booking does not fit, with the words CUDA uses, so that whatever
    handles the real error is exercised by this one.
    """

    kind = "simulated"

    def __init__(self, capacity: int, others: int = 0, name: str = "Simulated card", index: int = 0) -> None:
        if capacity <= 0 or others < 0:
            raise ValueError(f"capacity must be above 0 and others not below 0 bytes, not {capacity} and {others}")
        self.index = index
        self.name = name
        self._capacity = capacity
        self._others = others
        self._bookings: list[Booking] = []
        self._booked = 0
        self._peak = 0
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        return self._capacity

    @property
    def booked_bytes(self) -> int:
        """Bytes booked by this process."""
        with self._lock:
            return self._booked

    @property
    def used_bytes(self) -> int:
        """Bytes booked and bytes of other programs."""
        with self._lock:
            return self._booked + self._others

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return max(0, self._capacity - self._others - self._booked)

    @property
    def peak_bytes(self) -> int:
        """The most that was ever booked at once."""
        with self._lock:
            return self._peak

    @property
    def bookings(self) -> tuple[Booking, ...]:
        with self._lock:
            return tuple(self._bookings)

    def set_others(self, nbytes: int) -> None:
        """Another program now holds `nbytes`; as on a real card this may leave less than nothing for us."""
        if nbytes < 0:
            raise ValueError(f"others must not be below 0 bytes, not {nbytes}")
        with self._lock:
            self._others = nbytes

    def allocate(self, nbytes: int, owner: str) -> Booking:
        """Book `nbytes` for `owner`. Raises torch.OutOfMemoryError and books nothing when they do not fit."""
        if nbytes < 0:
            raise ValueError(f"can't book {nbytes} bytes for {owner}")
        with self._lock:
            self._take(nbytes)
            booking = Booking(nbytes, owner)
            self._bookings.append(booking)
            return booking

    def resize(self, booking: Booking, nbytes: int) -> None:
        """Grow or shrink a booking; a growth that does not fit raises torch.OutOfMemoryError and changes nothing."""
        if nbytes < 0:
            raise ValueError(f"can't book {nbytes} bytes for {booking.owner}")
        with self._lock:
            self._must_be_live(booking)
            self._take(nbytes - booking.nbytes)
            booking.nbytes = nbytes

    def release(self, booking: Booking) -> None:
        """Give a booking back; a second release raises ValueError, as a double free would."""
        with self._lock:
            self._must_be_live(booking)
            self._bookings.remove(booking)
            self._booked -= booking.nbytes
            booking.live = False

    def read(self) -> MemoryReading:
        with self._lock:
            free = max(0, self._capacity - self._others - self._booked)
            return MemoryReading(total=self._capacity, free=free, reserved=self._booked, active=self._booked)

    def _take(self, nbytes: int) -> None:
        free = max(0, self._capacity - self._others - self._booked)
        if nbytes > free:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {say_gib(nbytes)}. {self.name} has a total capacity of "
                f"{say_gib(self._capacity)} of which {say_gib(free)} is free. "
                f"Other programs hold {say_gib(self._others)}."
            )
        self._booked += nbytes
        self._peak = max(self._peak, self._booked)

    def _must_be_live(self, booking: Booking) -> None:
        if not any(live is booking for live in self._bookings):
            raise ValueError(f"{booking!r} is not booked on {self.name}")


def discover() -> tuple[Accelerator, ...]:
    """The cards torch can drive here; empty where there is no accelerator."""
    if torch.cuda.is_available():
        return tuple(TorchAccelerator("cuda", index) for index in range(torch.cuda.device_count()))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return tuple(TorchAccelerator("xpu", index) for index in range(torch.xpu.device_count()))
    if torch.backends.mps.is_available():
        return (MPSAccelerator(),)
    current = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if current is not None and hasattr(torch, current.type):
        return tuple(TorchAccelerator(current.type, index) for index in range(torch.accelerator.device_count()))
    return ()
