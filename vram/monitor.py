"""VRAMMonitor: what the cards hold right now, and whether a chain fits on one. All arithmetic of fitting is `plan`'s."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple

from .device import Accelerator, DeviceReadError, discover
from .estimate.caches import Pipeline, video_runtime_overhead
from .estimate.overheads import CONTEXT
from .plan.planner import chain_bytes, make_plan
from .plan.ram import SystemMemory
from .plan.types import Card, Chain, HeldModel, HostRules, Plan
from .records import PipelineMemoryRecord, VideoMemoryBreakdown
from .units import MIB, gib

DEFAULT_SAFETY_MARGIN: Final = 256 * MIB
"""Never planned with. comfy-aimdo evicts below 256 MiB free, so a plan that leaves less would not hold still."""


HAVE_CONTEXTS: Final = frozenset({"cuda", "rocm"})
"""Kinds of card on which reading the memory already takes a context, whose size (estimate/overheads.py, CONTEXT) is usual."""


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
    """Free, and what is given back by itself when asked for: cached blocks, the host's idle models, elastic pages."""
    taken_at: float
    """Seconds of the monitor's clock."""
    stale: bool = False
    """The driver did not answer just now; these are the last good values."""
    context: int = 0
    """What the driver holds for this process beside its allocator."""

    @property
    def used(self) -> int:
        """What every program together holds."""
        return self.total - self.free

    @property
    def ours(self) -> int | None:
        """What this process holds: its allocator, pages beside it, and its context; None where it can't tell."""
        return None if self.reserved is None else min(self.used, self.reserved + self.context)

    @property
    def others(self) -> int | None:
        """What other programs hold, as far as this process can tell its own share."""
        return None if self.ours is None else self.used - self.ours

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
        self._records: dict[tuple[str, int], PipelineMemoryRecord] = {}
        self._video: dict[tuple[str, int], VideoMemoryBreakdown] = {}

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
        # an allocator gives its cached blocks back before it says that memory is out
        cached = 0 if reading.reserved is None or reading.active is None else max(0, reading.reserved - reading.active)
        back = max(0, min(self._reclaimable(accelerator.index) + cached, reading.total - reading.free))
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
            context=CONTEXT[1] if accelerator.kind in HAVE_CONTEXTS else 0,
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

    # what was measured

    def record_pipeline_load(self, pipeline: str, delta: int, index: int = 0) -> None:
        """The card had `delta` bytes less after this pipeline was loaded."""
        self._update(pipeline, index, lambda record: replace(record, load_delta=delta, loads=record.loads + 1))

    def record_pipeline_unload(self, pipeline: str, delta: int, index: int = 0) -> None:
        """The card had `delta` bytes more after this pipeline, or a part of it, left."""
        self._update(pipeline, index, lambda record: replace(record, unload_delta=delta, unloads=record.unloads + 1))

    def record_component_vram(self, pipeline: str, component: str, nbytes: int, index: int = 0) -> None:
        """One component takes `nbytes` of the card now."""
        if nbytes < 0:
            raise ValueError(f"{component} can't take {nbytes} bytes")
        self._update(
            pipeline,
            index,
            lambda record: replace(record, components=MappingProxyType({**record.components, component: nbytes})),
        )

    def pipeline_record(self, pipeline: str, index: int = 0) -> PipelineMemoryRecord | None:
        with self._lock:
            return self._records.get((pipeline, index))

    def pipeline_records(self) -> tuple[PipelineMemoryRecord, ...]:
        """Every record, per pipeline and card."""
        with self._lock:
            return tuple(self._records.values())

    def forget_pipeline(self, pipeline: str) -> None:
        """Drop what was measured of it, on every card."""
        with self._lock:
            for key in [key for key in self._records if key[0] == pipeline]:
                del self._records[key]
            for key in [key for key in self._video if key[0] == pipeline]:
                del self._video[key]

    def _update(self, pipeline: str, index: int, change: Callable[[PipelineMemoryRecord], PipelineMemoryRecord]) -> None:
        now = self._clock()
        with self._lock:
            record = self._records.get((pipeline, index)) or PipelineMemoryRecord(pipeline, index)
            self._records[(pipeline, index)] = replace(change(record), taken_at=now)

    def record_video_memory(
        self, pipeline: str, kv_cache: int = 0, temporal_buffer: int = 0, vae_cache: int = 0, index: int = 0
    ) -> VideoMemoryBreakdown:
        """What a video of this pipeline takes beside weights right now, in bytes. Returns it with the peak so far."""
        if min(kv_cache, temporal_buffer, vae_cache) < 0:
            raise ValueError(f"video memory can't be below 0 bytes: {kv_cache}, {temporal_buffer}, {vae_cache}")
        with self._lock:
            peak = self._video.get((pipeline, index), VideoMemoryBreakdown()).peak_runtime
            now = VideoMemoryBreakdown(kv_cache, temporal_buffer, vae_cache)
            now = self._video[(pipeline, index)] = replace(now, peak_runtime=max(peak, now.current))
            return now

    def video_memory(self, pipeline: str, index: int = 0) -> VideoMemoryBreakdown:
        with self._lock:
            return self._video.get((pipeline, index), VideoMemoryBreakdown())

    def clear_video_memory(self, pipeline: str, index: int = 0) -> VideoMemoryBreakdown:
        """The video is done: nothing is held any more, and the peak is kept."""
        with self._lock:
            peak = self._video.get((pipeline, index), VideoMemoryBreakdown()).peak_runtime
            cleared = self._video[(pipeline, index)] = VideoMemoryBreakdown(peak_runtime=peak)
            return cleared

    # whether it fits

    def plan_chain(
        self,
        chain: Chain,
        rules: HostRules,
        held: Iterable[HeldModel] = (),
        index: int = 0,
        runtime_overhead: int | None = None,
        running_beside: int | None = None,
        memory: SystemMemory | None = None,
    ) -> Plan:
        """What `chain` will do to this card, with `held` loaded already.

        `runtime_overhead` are bytes that its videos keep beside weights and activations, where that is more than the plan knows
        of (`estimate_video_runtime_overhead_gb` tells it for streaming pipelines). `running_beside` is as for `card`; `memory`
        is the system's, None leaves it out.
        """
        card = self.card(index, running_beside)
        if card is not None and runtime_overhead:
            card = replace(card, safety_margin=card.safety_margin + runtime_overhead)
        return make_plan(chain, card, rules, held, memory)

    def can_fit_chain(
        self,
        chain: Chain,
        rules: HostRules,
        held: Iterable[HeldModel] = (),
        index: int = 0,
        runtime_overhead: int | None = None,
        make_room: Callable[[int], int] | None = None,
    ) -> FitAnswer:
        """Whether `chain` runs on this card beside other programs, the safety margin and the runtime overhead.

        What is loaded counts once. `make_room` is asked for the new memory the chain needs, never for its total, and only
        where that much is not free; it returns the bytes it freed, and the answer is then given for the card as it is.
        """
        held = tuple(held)
        plan = self.plan_chain(chain, rules, held, index, runtime_overhead)
        if make_room is not None and plan.new_bytes > 0:
            card = self.card(index)
            wanted = plan.new_bytes + plan.card.safety_margin
            if card is not None and wanted > card.free:
                gone = self._gone(held, make_room(wanted), index)
                # what left is free now, and must not count as loaded as well
                plan = self.plan_chain(chain, rules, _less(held, gone), index, runtime_overhead)
        return FitAnswer(plan.runs, plan.message)

    def _gone(self, held: tuple[HeldModel, ...], freed: int, index: int) -> int:
        """How much of `held` left when `freed` bytes did: no more can be loaded than the allocator's tensors use."""
        try:
            active = self.snapshot(index).active
        except (NoAcceleratorError, DeviceReadError):
            active = None
        loaded = sum(model.bytes_on_card for model in held if not model.elastic)
        return freed if active is None else max(0, loaded - active)

    @staticmethod
    def estimate_chain_vram_gb(chain: Chain, rules: HostRules) -> float:
        """GiB the chain would take at once with every weight in place: the largest of its phases, since they do not overlap."""
        return gib(chain_bytes(chain, rules))

    @staticmethod
    def estimate_video_runtime_overhead_gb(
        width: int, height: int, frames: int = 81, causal: bool = False, pipeline: Pipeline | None = None
    ) -> float:
        """GiB that a video of this size keeps beside weights and activations: caches of keys and values, latents, features.

        `pipeline` names the loop that makes it; None: ComfyUI's, with `causal` its causal one. Raises ValueError for a size
        below 1 and for a pipeline nobody read.
        """
        overhead = video_runtime_overhead(width=width, height=height, frames=frames, causal=causal, pipeline=pipeline)
        return gib(overhead.total)


def _less(held: tuple[HeldModel, ...], freed: int) -> tuple[HeldModel, ...]:
    """Loaded models after `freed` bytes of them left, the last listed (the longest unused) first."""
    left: list[HeldModel] = []
    for model in reversed(held):
        gone = min(freed, model.bytes_on_card)
        freed -= gone
        left.append(model._replace(bytes_on_card=model.bytes_on_card - gone))
    return tuple(reversed(left))


_monitor: VRAMMonitor | None = None
_monitor_lock = threading.Lock()


def get_vram_monitor() -> VRAMMonitor:
    """The monitor of this process."""
    global _monitor
    with _monitor_lock:
        if _monitor is None:
            _monitor = VRAMMonitor()
        return _monitor
