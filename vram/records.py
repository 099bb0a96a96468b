"""What was measured: VRAM that pipelines and components took, video buffers, and every move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from .components import ComponentRole
from .handle import Placement

NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PipelineMemoryRecord:
    """Measured VRAM of one pipeline on one card, in bytes. None: not measured yet."""

    pipeline: str
    device_index: int = 0
    load_delta: int | None = None
    """What the card had less of after the last load."""
    unload_delta: int | None = None
    """What it had more of after the last unload."""
    loads: int = 0
    unloads: int = 0
    components: Mapping[str, int] = field(default_factory=lambda: NONE)
    """What each component takes, by name."""
    taken_at: float = 0.0
    """Seconds of the monitor's clock."""


@dataclass(frozen=True, slots=True)
class VideoMemoryBreakdown:
    """What a video takes beside weights, in bytes, with the most it ever took at once."""

    kv_cache: int = 0
    temporal_buffer: int = 0
    vae_cache: int = 0
    peak_runtime: int = 0
    """The most that the three ever were together; survives clearing."""

    @property
    def current(self) -> int:
        return self.kv_cache + self.temporal_buffer + self.vae_cache


class ComponentOffloadRecord(NamedTuple):
    """One move of one component, done or failed."""

    pipeline: str
    component: str
    role: ComponentRole
    source: Placement
    target: Placement
    """Where it was after the move: where it had been, if that failed."""
    bytes: int
    seconds: float
    reason: str
    error: str | None = None
