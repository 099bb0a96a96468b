"""VRAMOffloader: the books of which model belongs to which pipeline and where it is. Registration and status only, for now.

A model is looked at, and later moved, only through the handle it was registered with. The books hold no model: a handle
whose model is gone says so, and its component disappears by itself.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from .components import ComponentRole

Placement = Literal["gpu", "cpu", "partial"]
PipelineState = Literal["active", "idle", "offloaded"]


class ModelHandle(Protocol):
    """One model, seen through whoever places it. Shaped on ComfyUI's patchers; reads never move or allocate anything."""

    @property
    def key(self) -> object:
        """Equal for two handles of one model, however many clones of it there are."""
        ...

    @property
    def alive(self) -> bool:
        """False once the model itself is gone."""
        ...

    @property
    def in_use(self) -> bool:
        """Its host computes with it right now."""
        ...

    @property
    def elastic(self) -> bool:
        """Its weights come and go by themselves (DynamicVRAM): no threshold evicts it."""
        ...

    def total_bytes(self) -> int:
        """Bytes of the whole model on the card."""
        ...

    def bytes_on_card(self) -> int: ...


class ComponentStatus(NamedTuple):
    """One component at one moment."""

    name: str
    role: ComponentRole
    placement: Placement
    bytes: int
    bytes_on_card: int
    node_id: str | None


class PipelineStatus(NamedTuple):
    """One pipeline at one moment."""

    name: str
    state: PipelineState
    components: tuple[ComponentStatus, ...]


@dataclass(frozen=True, slots=True)
class _Component:
    name: str
    role: ComponentRole
    handle: ModelHandle
    node_id: str | None


class VRAMOffloader:
    """Pipelines and their components. Thread-safe; a status takes one short lock and asks each handle outside it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipelines: dict[str, dict[object, _Component]] = {}

    def register(self, pipeline: str, name: str, role: ComponentRole, handle: ModelHandle, node_id: str | None = None) -> None:
        """Enter a loaded model as a component of `pipeline`. Registering one model again renames it, never doubles it."""
        if not pipeline.strip():
            raise ValueError("a pipeline needs a name; leave the field as it was if one is enough")
        with self._lock:
            self._pipelines.setdefault(pipeline, {})[handle.key] = _Component(name, role, handle, node_id)

    def unregister(self, pipeline: str) -> bool:
        """Forget a pipeline; its models stay where they are. False if there was none of that name."""
        with self._lock:
            return self._pipelines.pop(pipeline, None) is not None

    def pipeline_of(self, key: object) -> str | None:
        """The pipeline that a model (by its handle's key) belongs to."""
        with self._lock:
            return next((name for name, components in self._pipelines.items() if key in components), None)

    def get_loaded_pipelines(self) -> tuple[str, ...]:
        """Pipelines with at least one byte on the card."""
        return tuple(status.name for status in self.status() if any(c.bytes_on_card for c in status.components))

    def status(self) -> tuple[PipelineStatus, ...]:
        """Every pipeline and component. Components whose model is gone are dropped from the books here."""
        with self._lock:
            self._drop_dead()
            books = [(name, tuple(components.values())) for name, components in self._pipelines.items()]
        return tuple(_pipeline_status(name, components) for name, components in books)

    def _drop_dead(self) -> None:
        for name in list(self._pipelines):
            components = self._pipelines[name]
            for key in [key for key, component in components.items() if not component.handle.alive]:
                del components[key]
            if not components:
                del self._pipelines[name]


def _pipeline_status(name: str, components: tuple[_Component, ...]) -> PipelineStatus:
    seen = tuple(_component_status(component) for component in components)
    if any(component.handle.in_use for component in components):
        return PipelineStatus(name, "active", seen)
    return PipelineStatus(name, "idle" if any(component.bytes_on_card for component in seen) else "offloaded", seen)


def _component_status(component: _Component) -> ComponentStatus:
    total, on_card = component.handle.total_bytes(), component.handle.bytes_on_card()
    placement: Placement = "cpu" if on_card == 0 else "gpu" if on_card >= total else "partial"
    return ComponentStatus(component.name, component.role, placement, total, on_card, component.node_id)


_offloader: VRAMOffloader | None = None
_offloader_lock = threading.Lock()


def get_vram_offloader() -> VRAMOffloader:
    """The offloader of this process."""
    global _offloader
    with _offloader_lock:
        if _offloader is None:
            _offloader = VRAMOffloader()
        return _offloader
