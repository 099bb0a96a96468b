"""VRAMMonitor: what the cards hold right now, and whether a chain fits on one. All arithmetic of fitting is `plan`'s."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from .device import Accelerator, DeviceReadError, discover
from .plan.planner import make_plan
from .plan.types import Card, Chain, HeldModel, HostRules, Plan
from .units import MIB

DEFAULT_SAFETY_MARGIN: Final = 256 * MIB
"""Never planned with. comfy-aimdo evicts below 256 MiB free, so a plan that leaves less would not hold still."""


class NoAcceleratorError(RuntimeError):
    """There is no card of the index asked for."""


@dataclass(frozen=True, slots=True)
class GPUSnapshot:
    """One card at one moment. Bytes; None where this driver or allocator can't tell."""

    index: int
    name: str
    kind: str
    total: int
    free: int
    reserved: int | None
    active: int | None
    reclaimable_free: int
    """Free, and what the host gives back by itself when asked: idle models, elastic pages."""
    taken_at: float
    """Seconds of the monitor's clock."""
    stale: bool = False
    """The driver did not answer just now; these are the last good values."""

    @property
    def used(self) -> int:
        """What every program together holds."""
        return self.total - self.free

    @property
    def others(self) -> int | None:
        """What other programs hold, as far as this process can tell its own share."""
        return None if self.reserved is None else max(0, self.used - self.reserved)

    @property
    def utilization_percent(self) -> float:
        """Used of total."""
        return 100.0 * self.used / self.total if self.total else 0.0

    @property
    def pressure_percent(self) -> float:
        """What cannot be given back, of total: the number that colours and warnings follow."""
        return 100.0 * (self.total - self.reclaimable_free) / self.total if self.total else 0.0


class FitAnswer(NamedTuple):
    """Whether a chain runs on the card, and why, in a sentence for a person."""

    fits: bool
    message: str


class VRAMMonitor:
    """Reads the cards and answers for them. Thread-safe; holds no lock while a driver is asked.

    `accelerators` finds the cards on first use, `clock` counts seconds, `reclaimable` says how many bytes of a card (by index)
    the host would give back when asked.
    """

    def __init__(
        self,
        accelerators: Callable[[], Sequence[Accelerator]] = discover,
        clock: Callable[[], float] = time.monotonic,
        reclaimable: Callable[[int], int] = lambda index: 0,
        safety_margin: int = DEFAULT_SAFETY_MARGIN,
    ) -> None:
        if safety_margin < 0:
            raise ValueError(f"safety_margin must not be below 0 bytes, not {safety_margin}")
        self._find = accelerators
        self._clock = clock
        self._reclaimable = reclaimable
        self.safety_margin = safety_margin
        self._lock = threading.Lock()
        self._accelerators: tuple[Accelerator, ...] | None = None
        self._last_good: dict[int, GPUSnapshot] = {}

    def connect(
        self, accelerators: Callable[[], Sequence[Accelerator]], reclaimable: Callable[[int], int] | None = None
    ) -> None:
        """Read these cards from now on: what a host knows about its devices goes before what torch lists."""
        with self._lock:
            self._find = accelerators
            self._accelerators = None
            self._last_good.clear()
            if reclaimable is not None:
                self._reclaimable = reclaimable

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        with self._lock:
            if self._accelerators is None:
                self._accelerators = tuple(self._find())
            return self._accelerators

    def now(self) -> float:
        """Seconds of the monitor's clock: what a snapshot's age is counted from."""
        return self._clock()

    def snapshots(self) -> tuple[GPUSnapshot, ...]:
        """Every card that answers now or answered before; one that fails keeps its last good values, marked stale."""
        taken = (self._try_snapshot(accelerator) for accelerator in self.accelerators)
        return tuple(snapshot for snapshot in taken if snapshot is not None)

    def snapshot(self, index: int = 0) -> GPUSnapshot:
        """One card. Raises NoAcceleratorError if there is none, DeviceReadError if it never answered."""
        accelerator = next((card for card in self.accelerators if card.index == index), None)
        if accelerator is None:
            raise NoAcceleratorError(f"there is no accelerator {index} on this machine")
        snapshot = self._try_snapshot(accelerator)
        if snapshot is None:
            raise DeviceReadError(f"{accelerator.name} has not answered a memory query yet")
        return snapshot

    def _try_snapshot(self, accelerator: Accelerator) -> GPUSnapshot | None:
        try:
            reading = accelerator.read()
        except DeviceReadError:
            with self._lock:
                last = self._last_good.get(accelerator.index)
            return replace(last, stale=True) if last is not None else None
        back = max(0, min(self._reclaimable(accelerator.index), reading.total - reading.free))
        snapshot = GPUSnapshot(
            index=accelerator.index,
            name=accelerator.name,
            kind=accelerator.kind,
            total=reading.total,
            free=reading.free,
            reserved=reading.reserved,
            active=reading.active,
            reclaimable_free=reading.free + back,
            taken_at=self._clock(),
        )
        with self._lock:
            self._last_good[accelerator.index] = snapshot
        return snapshot

    def card(self, index: int = 0, running_beside: int | None = None) -> Card | None:
        """The card as the planner wants it: the allocator's cached blocks are free to it. None without an accelerator.

        While a prompt runs, `running_beside` is how many of the active bytes are weights: the rest are its activations, free
        by the time another prompt starts. None: nothing runs, and what is active without being a model stays.
        """
        try:
            seen = self.snapshot(index)
        except (NoAcceleratorError, DeviceReadError):
            return None
        active = seen.active or 0
        passing = max(0, (seen.reserved or 0) - active) if seen.active is not None else 0
        if running_beside is not None:
            passing += max(0, active - running_beside)
        return Card(seen.name, seen.total, min(seen.total, seen.free + passing), self.safety_margin)

    def plan_chain(self, chain: Chain, rules: HostRules, held: Iterable[HeldModel] = (), index: int = 0) -> Plan:
        """What `chain` will do to this card, with `held` loaded already."""
        return make_plan(chain, self.card(index), rules, held)

    def can_fit_chain(self, chain: Chain, rules: HostRules, held: Iterable[HeldModel] = (), index: int = 0) -> FitAnswer:
        """Whether `chain` runs on this card beside other programs and the safety margin; what is loaded counts once."""
        plan = self.plan_chain(chain, rules, held, index)
        return FitAnswer(plan.runs, plan.message)


_monitor: VRAMMonitor | None = None
_monitor_lock = threading.Lock()


def get_vram_monitor() -> VRAMMonitor:
    """The monitor of this process."""
    global _monitor
    with _monitor_lock:
        if _monitor is None:
            _monitor = VRAMMonitor()
        return _monitor
