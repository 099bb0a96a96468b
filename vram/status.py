"""Joins the cards, the books and the host's loaded models into one immutable Status: the only thing the browser reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from .books import PipelineStatus
from .monitor import GPUSnapshot, VRAMMonitor
from .offloader import VRAMOffloader
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


class PipelineReport(TypedDict):
    name: str
    state: str
    components: list[ComponentReport]


class StatusReport(TypedDict):
    version: str
    devices: list[DeviceReport]
    pipelines: list[PipelineReport]
    loaded_models: list[dict[str, object]]
    running: dict[str, object] | None
    host: dict[str, str]
    seams: list[dict[str, object]]
    self_check: dict[str, object] | None


def read_status(
    version: str,
    monitor: VRAMMonitor,
    offloader: VRAMOffloader,
    loaded_models: tuple[LoadedModel, ...],
    running: Running | None,
    rules: HostRules,
    seams: tuple[SeamReport, ...],
    self_check: SelfCheckReport | None = None,
) -> Status:
    """One look at everything. Allocates nothing on the card and waits for no transfer."""
    return Status(
        version, monitor.now(), monitor.snapshots(), offloader.status(), loaded_models, running, rules, seams, self_check
    )


def status_report(status: Status) -> StatusReport:
    """The answer of GET /api/v1/hardware/vram."""
    return StatusReport(
        version=status.version,
        devices=[_device(snapshot, status.taken_at) for snapshot in status.devices],
        pipelines=[
            PipelineReport(
                name=pipeline.name,
                state=pipeline.state,
                components=[
                    ComponentReport(
                        name=component.name,
                        role=component.role.value,
                        placement=component.placement,
                        bytes=component.bytes,
                        bytes_on_card=component.bytes_on_card,
                        node_id=component.node_id,
                        key=component.key if isinstance(component.key, int) else None,
                        pinned=component.pinned,
                        elastic=component.elastic,
                        policy=component.policy.words,
                        in_use=component.in_use,
                        idle_seconds=round(max(0.0, status.taken_at - component.last_used), 3),
                    )
                    for component in pipeline.components
                ],
            )
            for pipeline in status.pipelines
        ],
        loaded_models=[{**model._asdict(), "registered": model.registered} for model in status.loaded_models],
        running=status.running._asdict() if status.running else None,
        host={
            "comfyui_version": status.rules.version,
            "patchers": status.rules.patchers,
            "vram_state": status.rules.vram_state,
        },
        seams=[seam._asdict() for seam in status.seams],
        self_check=None if status.self_check is None else status.self_check.as_json(),
    )


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
