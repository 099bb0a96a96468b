"""Joins the cards, the books and the host's loaded models into one immutable Status: the only thing the browser reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from .books import ComponentStatus, PipelineStatus
from .monitor import GPUSnapshot, VRAMMonitor
from .offloader import VRAMOffloader
from .plan.ram import SystemMemory
from .plan.types import HostRules
from .selfcheck import Report as SelfCheckReport


class LoadedModel(NamedTuple):
    """A model the host reports as loaded, whether or not anybody registered it. Bytes."""

    key: int
    """Names it in actions; equal for all clones."""
    name: str
    """Of its class."""
    file: str | None
    """Name of the file it was loaded from, where the host knows."""
    role: str
    dtype: str
    bytes: int
    bytes_on_card: int
    pipeline: str | None
    """The pipeline it is registered with; None: the host alone knows it."""
    in_use: bool
    elastic: bool
    """Its weights come and go by themselves; its figures are those of the last node boundary."""
    device_index: int
    age_seconds: float

    @property
    def registered(self) -> bool:
        return self.pipeline is not None


class Running(NamedTuple):
    """What the host executes right now."""

    prompt_id: str
    node_id: str | None


class SeamReport(NamedTuple):
    """One place where we hold on to the host, and what is lost without it."""

    name: str
    kind: Literal["official", "private"]
    since: str
    state: Literal["live", "absent", "off"]
    without_it: str


class WaitingAction(NamedTuple):
    """What a person asked of a model and the host has not come to yet."""

    id: str
    action: str
    key: int | None
    """The model's; None: of all that are idle."""
    name: str | None
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """Everything the browser shows, at one moment."""

    version: str
    taken_at: float
    devices: tuple[GPUSnapshot, ...]
    pipelines: tuple[PipelineStatus, ...]
    loaded_models: tuple[LoadedModel, ...]
    running: Running | None
    rules: HostRules
    seams: tuple[SeamReport, ...]
    self_check: SelfCheckReport | None = None
    """Whether the estimates agree with the installed host's own code."""
    waiting: tuple[WaitingAction, ...] = ()
    memory: SystemMemory | None = None
    """The machine's; None where it can't be read."""
    memory_ours: int | None = None
    """Bytes of it that this process holds."""


class DeviceReport(TypedDict):
    index: int
    name: str
    kind: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    reserved_bytes: int | None
    active_bytes: int | None
    ours_bytes: int | None
    others_bytes: int | None
    reclaimable_free_bytes: int
    utilization_percent: float
    pressure_percent: float
    stale: bool
    age_seconds: float


class ComponentReport(TypedDict):
    name: str
    role: str
    placement: str
    bytes: int
    bytes_on_card: int
    node_id: str | None
    key: int | None
    pinned: bool
    elastic: bool
    policy: str
    """In words: `pinned`, `leaves when idle`, `leaves between uses`, `the host decides`, `stays until memory is wanted`."""
    in_use: bool
    idle_seconds: float
    dtype: str
    """What its weights are computed in; empty where nobody tells."""
    device_index: int
    age_seconds: float
    """Of its bytes on the card: those of elastic weights are as old as the last node boundary."""


class RamReport(TypedDict):
    total_bytes: int
    available_bytes: int
    """What programs can still have without swapping, the container's limit included."""
    limit_bytes: int | None
    """The container's; null: there is none."""
    ours_bytes: int | None
    """What this process holds."""


class PipelineReport(TypedDict):
    name: str
    state: str
    components: list[ComponentReport]


class StatusReport(TypedDict):
    version: str
    taken_at: float
    """Seconds of a clock that only goes forward: of two reports the higher is the newer."""
    devices: list[DeviceReport]
    pipelines: list[PipelineReport]
    loaded_models: list[dict[str, object]]
    running: dict[str, object] | None
    host: dict[str, str | int]
    """With `reserve_bytes`, what it keeps free on the card beside inference."""
    seams: list[dict[str, object]]
    self_check: dict[str, object] | None
    waiting: list[dict[str, object]]
    ram: RamReport | None


def read_status(
    version: str,
    monitor: VRAMMonitor,
    offloader: VRAMOffloader,
    loaded_models: tuple[LoadedModel, ...],
    running: Running | None,
    rules: HostRules,
    seams: tuple[SeamReport, ...],
    self_check: SelfCheckReport | None = None,
    waiting: tuple[WaitingAction, ...] = (),
    memory: SystemMemory | None = None,
    memory_ours: int | None = None,
) -> Status:
    """One look at everything. Allocates nothing on the card and waits for no transfer."""
    return Status(
        version=version,
        taken_at=monitor.now(),
        devices=monitor.snapshots(),
        pipelines=offloader.status(),
        loaded_models=loaded_models,
        running=running,
        rules=rules,
        seams=seams,
        self_check=self_check,
        waiting=waiting,
        memory=memory,
        memory_ours=memory_ours,
    )


def status_report(status: Status) -> StatusReport:
    """The answer of GET /api/v1/hardware/vram."""
    loaded = {model.key: model for model in status.loaded_models}
    return StatusReport(
        version=status.version,
        taken_at=round(status.taken_at, 3),
        devices=[_device(snapshot, status.taken_at) for snapshot in status.devices],
        pipelines=[
            PipelineReport(
                name=pipeline.name,
                state=pipeline.state,
                components=[_component(component, loaded, status.taken_at) for component in pipeline.components],
            )
            for pipeline in status.pipelines
        ],
        loaded_models=[{**model._asdict(), "registered": model.registered} for model in status.loaded_models],
        running=status.running._asdict() if status.running else None,
        host={
            "comfyui_version": status.rules.version,
            "patchers": status.rules.patchers,
            "vram_state": status.rules.vram_state,
            "reserve_bytes": status.rules.reserve_bytes,
        },
        seams=[seam._asdict() for seam in status.seams],
        self_check=None if status.self_check is None else status.self_check.as_json(),
        waiting=[action._asdict() for action in status.waiting],
        ram=None if status.memory is None else _ram(status.memory, status.memory_ours),
    )


def _component(component: ComponentStatus, loaded: Mapping[int, LoadedModel], now: float) -> ComponentReport:
    key = component.key if isinstance(component.key, int) else None
    seen = loaded.get(key) if key is not None else None
    return ComponentReport(
        name=component.name,
        role=component.role.value,
        placement=component.placement,
        bytes=component.bytes,
        bytes_on_card=component.bytes_on_card,
        node_id=component.node_id,
        key=key,
        pinned=component.pinned,
        elastic=component.elastic,
        policy=component.policy.words,
        in_use=component.in_use,
        idle_seconds=round(max(0.0, now - component.last_used), 3),
        dtype=component.dtype or (seen.dtype if seen is not None else ""),
        device_index=component.device_index,
        age_seconds=round(seen.age_seconds, 3) if seen is not None else 0.0,
    )


def _ram(memory: SystemMemory, ours: int | None) -> RamReport:
    return RamReport(total_bytes=memory.total, available_bytes=memory.room, limit_bytes=memory.limit, ours_bytes=ours)


def _device(snapshot: GPUSnapshot, now: float) -> DeviceReport:
    return DeviceReport(
        index=snapshot.index,
        name=snapshot.name,
        kind=snapshot.kind,
        total_bytes=snapshot.total,
        used_bytes=snapshot.used,
        free_bytes=snapshot.free,
        reserved_bytes=snapshot.reserved,
        active_bytes=snapshot.active,
        ours_bytes=snapshot.ours,
        others_bytes=snapshot.others,
        reclaimable_free_bytes=snapshot.reclaimable_free,
        utilization_percent=round(snapshot.utilization_percent, 1),
        pressure_percent=round(snapshot.pressure_percent, 1),
        stale=snapshot.stale,
        age_seconds=round(max(0.0, now - snapshot.taken_at), 3),
    )
