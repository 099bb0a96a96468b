"""The books: which model belongs to which pipeline, who uses it, what moved. Placement is never written down here.

It is read from the handles, so the books can't be wrong about it. One short lock; nothing is moved while it is held.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Final, Literal, NamedTuple

from .components import ComponentRole
from .handle import ModelHandle, Placement, placement_of
from .policy import PersonsWord, VideoComponentPolicy, under_word
from .records import ComponentOffloadRecord

PipelineState = Literal["active", "idle", "offloaded"]

HISTORY: Final = 256
"""Moves remembered."""


class UnknownPipelineError(LookupError):
    """No pipeline of that name is registered."""


class ComponentStatus(NamedTuple):
    """One component at one moment."""

    name: str
    role: ComponentRole
    placement: Placement
    bytes: int
    bytes_on_card: int
    node_id: str | None
    pinned: bool
    key: object
    """Of its handle."""
    elastic: bool
    in_use: bool
    policy: VideoComponentPolicy
    last_used: float
    """Of its pipeline, in seconds of the clock that the offloader counts with."""
    device_index: int = 0
    dtype: str = ""
    """What its weights are computed in; empty where its handle does not tell."""


class PipelineStatus(NamedTuple):
    """One pipeline at one moment."""

    name: str
    state: PipelineState
    components: tuple[ComponentStatus, ...]


class Component(NamedTuple):
    """A registered model with the rule it is placed by."""

    name: str
    role: ComponentRole
    handle: ModelHandle
    node_id: str | None
    policy: VideoComponentPolicy
    default: VideoComponentPolicy
    """What holds where nobody rules otherwise."""
    ruled_by: str | None = None
    """The node that set the policy; None: it is the default, or was set from elsewhere."""
    ruled: VideoComponentPolicy | None = None
    """What was set in place of the default, as it would hold without a person's word."""
    word: PersonsWord | None = None
    """A person's, which goes before every other rule until they take it back or the model goes."""

    def settled(self) -> Component:
        """With the policy that follows from all that was said of it."""
        return self._replace(policy=under_word(self.ruled or self.default, self.word, self.handle.elastic))

    @property
    def may_leave(self) -> bool:
        return not (self.policy.pin_to_gpu or self.policy.host_decides or self.handle.elastic)


class Pipeline:
    """A named set of components. Its fields change under the books' lock; its models move under `moving`."""

    def __init__(self, name: str, now: float, moving: threading.RLock) -> None:
        self.name = name
        self.components: dict[object, Component] = {}
        self.moving = moving
        self.last_used = now


class Books:
    """Pipelines by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipelines: dict[str, Pipeline] = {}
        # by name and by model, and kept: what is registered anew during a move or a use is the same thing as before
        self._users: Counter[str] = Counter()
        self._moving: dict[str, threading.RLock] = {}
        self._models: dict[object, threading.RLock] = {}
        self.revision = 0
        """Another number after every change of what is registered and by which rule."""
        self._history: deque[ComponentOffloadRecord] = deque(maxlen=HISTORY)

    def enter(self, pipeline: str, component: Component, now: float) -> None:
        """A model belongs to one pipeline: the one that registered it last."""
        with self._lock:
            for other in self._pipelines.values():
                if other.name != pipeline:
                    other.components.pop(component.handle.key, None)
            found = self._pipelines.get(pipeline)
            if found is None:
                moving = self._moving.setdefault(pipeline, threading.RLock())
                found = self._pipelines[pipeline] = Pipeline(pipeline, now, moving)
            found.components[component.handle.key] = component
            self.revision += 1

    def remove(self, pipeline: str) -> bool:
        with self._lock:
            self.revision += 1
            return self._pipelines.pop(pipeline, None) is not None

    def find(self, pipeline: str) -> Pipeline:
        """Raises UnknownPipelineError."""
        with self._lock:
            found = self._pipelines.get(pipeline)
        if found is None:
            raise UnknownPipelineError(f"no pipeline {pipeline!r} is registered")
        return found

    def pipeline_of(self, key: object) -> str | None:
        with self._lock:
            return next((p.name for p in self._pipelines.values() if self._living(p, key)), None)

    def policy_of(self, key: object) -> VideoComponentPolicy | None:
        with self._lock:
            return next((p.components[key].policy for p in self._pipelines.values() if self._living(p, key)), None)

    def components(self, pipeline: Pipeline) -> list[Component]:
        """Its components whose models still exist."""
        with self._lock:
            return [component for component in pipeline.components.values() if component.handle.alive]

    def model_lock(self, key: object) -> threading.RLock:
        """Held while one model moves, whichever pipeline it belongs to by then. Nothing else is waited for under it."""
        with self._lock:
            return self._models.setdefault(key, threading.RLock())

    def find_component(self, key: object) -> tuple[Pipeline, Component] | None:
        """The model of this key with the pipeline it belongs to."""
        with self._lock:
            return next(((p, p.components[key]) for p in self._pipelines.values() if self._living(p, key)), None)

    def replace_component(self, pipeline: Pipeline, component: Component) -> bool:
        """Change what is written of a model; False if it belongs to `pipeline` no longer."""
        with self._lock:
            if component.handle.key not in pipeline.components:
                return False
            pipeline.components[component.handle.key] = component
            self.revision += 1
            return True

    def every_component(self) -> tuple[tuple[str, Component], ...]:
        """All whose models still exist, with the name of their pipeline."""
        with self._lock:
            return tuple(
                (p.name, component)
                for p in self._pipelines.values()
                for component in p.components.values()
                if component.handle.alive
            )

    def begin_use(self, pipeline: Pipeline, now: float) -> None:
        with self._lock:
            self._users[pipeline.name] += 1
            pipeline.last_used = now

    def end_use(self, name: str, now: float) -> bool:
        """True when it was the last use. Counted by name: the pipeline may have been forgotten during the use."""
        with self._lock:
            self._users[name] = max(0, self._users[name] - 1)
            if name in self._pipelines:
                self._pipelines[name].last_used = now
            return not self._users[name]

    def in_use(self, pipeline: Pipeline) -> bool:
        with self._lock:
            return self._users[pipeline.name] > 0

    def touch(self, pipeline: Pipeline, now: float) -> None:
        with self._lock:
            pipeline.last_used = now

    def may_leave(self, pipeline: Pipeline, component: Component) -> bool:
        """Nobody uses this pipeline, and the component is still its own."""
        with self._lock:
            current = self._pipelines.get(pipeline.name)
            return current is pipeline and not self._users[pipeline.name] and component.handle.key in pipeline.components

    def idle_by_age(self, keep: frozenset[str]) -> list[Pipeline]:
        """Idle pipelines but `keep`, least recently used first."""
        with self._lock:
            idle = [p for p in self._pipelines.values() if not self._users[p.name] and p.name not in keep]
            return sorted(idle, key=lambda pipeline: pipeline.last_used)

    def note(self, record: ComponentOffloadRecord) -> None:
        with self._lock:
            self._history.append(record)

    def history(self) -> tuple[ComponentOffloadRecord, ...]:
        with self._lock:
            return tuple(self._history)

    def status(self) -> tuple[PipelineStatus, ...]:
        """Every pipeline and component; those whose model is gone are dropped here. Waits for no move."""
        with self._lock:
            self._drop_dead()
            seen = [
                (p.name, self._users[p.name] > 0, tuple(p.components.values()), p.last_used) for p in self._pipelines.values()
            ]
        return tuple(_pipeline_status(*found) for found in seen)

    @staticmethod
    def _living(pipeline: Pipeline, key: object) -> bool:
        """A key is a model's for as long as it lives: another one may have it after that."""
        return key in pipeline.components and pipeline.components[key].handle.alive

    def _drop_dead(self) -> None:
        for name in list(self._pipelines):
            components = self._pipelines[name].components
            for key in [key for key, component in components.items() if not component.handle.alive]:
                del components[key]
                self.revision += 1
            if not components:
                del self._pipelines[name]


def _pipeline_status(name: str, used: bool, components: tuple[Component, ...], last_used: float) -> PipelineStatus:
    seen = tuple(_component_status(component, last_used) for component in components)
    if used or any(component.in_use for component in seen):
        return PipelineStatus(name, "active", seen)
    return PipelineStatus(name, "idle" if any(component.bytes_on_card for component in seen) else "offloaded", seen)


def _component_status(component: Component, last_used: float) -> ComponentStatus:
    # one look: a move may be under way, and placement and bytes must not contradict each other
    total, on_card = component.handle.total_bytes(), component.handle.bytes_on_card()
    return ComponentStatus(
        name=component.name,
        role=component.role,
        placement=placement_of(total, on_card),
        bytes=total,
        bytes_on_card=on_card,
        node_id=component.node_id,
        pinned=component.policy.pin_to_gpu,
        key=component.handle.key,
        elastic=component.handle.elastic,
        in_use=component.handle.in_use,
        policy=component.policy,
        last_used=last_used,
        device_index=component.handle.device_index,
        dtype=str(getattr(component.handle, "dtype", "")),
    )
