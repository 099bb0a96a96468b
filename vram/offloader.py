"""VRAMOffloader: places pipelines: who stays on the card, who may leave, who has to.

Each pipeline has a lock for moving its models. Nobody waits for a second pipeline's lock while holding one: a pipeline that is
being moved is passed over as a victim, so no two threads can wait for each other.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from .books import Books, Component, Pipeline, PipelineStatus, UnknownPipelineError
from .components import ComponentRole, find_components
from .device import DeviceReadError
from .handle import ModelHandle, placement_of
from .monitor import NoAcceleratorError, VRAMMonitor, get_vram_monitor
from .policy import PersonsWord, VideoComponentPolicy, default_policy
from .records import ComponentOffloadRecord
from .recovery import Rung, run_with_recovery
from .units import GIB, say_gib

logger = logging.getLogger("vram_headroom")

DEFAULT_THRESHOLD: Final = 3 * GIB // 2
"""Idle pipelines leave when less than 1.5 GiB can be had: room for one 480p forward of the 1.3B model (1.4 GiB, traced)."""


class ActivePipelineError(RuntimeError):
    """A pipeline that is in use can't be sent off the card."""


class PlacementError(RuntimeError):
    """A component could not be moved; it is whole where it was. The message says which, where and why."""


class VRAMOffloader:
    """Places pipelines. Thread-safe.

    `monitor` says how much is free, `clock` counts seconds, `threshold` is the reclaimable free memory (bytes) below which
    idle pipelines leave, `cleanup` empties the allocator's cache, `interrupts` are errors by which the host stops a prompt:
    they always pass.
    """

    def __init__(
        self,
        monitor: VRAMMonitor | None = None,
        clock: Callable[[], float] = time.monotonic,
        threshold: int = DEFAULT_THRESHOLD,
        cleanup: Callable[[], None] | None = None,
        interrupts: tuple[type[BaseException], ...] = (),
    ) -> None:
        if threshold < 0:
            raise ValueError(f"threshold must not be below 0 bytes, not {threshold}")
        self._monitor = monitor or VRAMMonitor()
        self._clock = clock
        self.threshold = threshold
        self._cleanup = cleanup or empty_cache
        self.interrupts = interrupts
        self._books = Books()

    # books

    def register(
        self,
        pipeline: str,
        name: str,
        role: ComponentRole,
        handle: ModelHandle,
        node_id: str | None = None,
        policy: VideoComponentPolicy | None = None,
    ) -> None:
        """Enter a model as a component of `pipeline`. Registering one model again renames it, never doubles it.

        Without a `policy` its role's default holds. What a node ruled by `set_policy`, or a person by `set_pin`, goes on to
        hold. Raises ValueError for a pipeline without a name.
        """
        if not pipeline.strip():
            raise ValueError("a pipeline needs a name; leave the field as it was if one is enough")
        default = policy or default_policy(role, handle.elastic)
        component = Component(name, role, handle, node_id, default, default)
        known = self._books.find_component(handle.key)
        if known is not None:
            before = known[1]
            component = component._replace(word=before.word)
            if before.ruled_by is not None:
                component = component._replace(ruled=before.ruled, ruled_by=before.ruled_by)
        self._books.enter(pipeline, component.settled(), self._clock())

    def register_object(self, pipeline: str, source: object, handle_of: Callable[[Any], ModelHandle]) -> tuple[str, ...]:
        """Register every model found in `source` (a diffusers pipeline, its ComponentsManager, a plain object, a patcher).

        `handle_of` makes the handle each is moved by. Returns the names found; raises ValueError if there is none.
        """
        found = find_components(source)
        if not found:
            raise ValueError(f"no model was found in {type(source).__name__}")
        for component in found:
            self.register(pipeline, component.name, component.role, handle_of(component.model))
        return tuple(component.name for component in found)

    def unregister(self, pipeline: str) -> bool:
        """Forget a pipeline; its models stay where they are. False if there was none of that name."""
        return self._books.remove(pipeline)

    def pipeline_of(self, key: object) -> str | None:
        """The pipeline that a model (by its handle's key) belongs to."""
        return self._books.pipeline_of(key)

    def set_policy(self, key: object, policy: VideoComponentPolicy | None, node_id: str | None = None) -> bool:
        """Give a registered model (by its handle's key) another rule; None: what it was registered with. False if it is not.

        `node_id` is the node that asked, whose rule goes when the node does. Nothing moves before the rule's next occasion.
        """
        found = self._books.find_component(key)
        if found is None:
            return False
        pipeline, component = found
        return self._books.replace_component(pipeline, component._replace(ruled=policy, ruled_by=node_id).settled())

    def set_pin(self, key: object, pinned: bool) -> bool:
        """A person pins a registered model (by its handle's key) to its card, or takes a pin off it, whoever set that.

        Their word goes before every rule of `set_policy`, until they say the opposite or the model goes. False if it is not
        registered. Nothing moves.
        """
        found = self._books.find_component(key)
        if found is None:
            return False
        pipeline, component = found
        # where no rule pins it there is nothing to take back, and a node may pin it again later
        ruled_so = (component.ruled or component.default).pin_to_gpu
        word: PersonsWord | None = "pin" if pinned else "unpin" if ruled_so else None
        return self._books.replace_component(pipeline, component._replace(word=word).settled())

    def components(self) -> tuple[tuple[str, Component], ...]:
        """Every registered model that still exists, with the name of its pipeline."""
        return self._books.every_component()

    @property
    def revision(self) -> int:
        """Another number after every change of what is registered and by which rule."""
        return self._books.revision

    def pinned_keys(self, index: int | None = None) -> frozenset[object]:
        """Models that a policy keeps on their card, by their handle's key; `index`: of one card only."""
        return frozenset(
            component.handle.key
            for _, component in self._books.every_component()
            if component.policy.pin_to_gpu and (index is None or component.handle.device_index == index)
        )

    def policy_of(self, key: object) -> VideoComponentPolicy | None:
        """The rule that a model (by its handle's key) is placed by; None for one that is in no pipeline."""
        return self._books.policy_of(key)

    def get_loaded_pipelines(self) -> tuple[str, ...]:
        """Pipelines with at least one byte on the card."""
        return tuple(status.name for status in self.status() if any(c.bytes_on_card for c in status.components))

    def status(self) -> tuple[PipelineStatus, ...]:
        """Every pipeline and component. Waits for no move; components whose model is gone are dropped from the books."""
        return self._books.status()

    def history(self) -> tuple[ComponentOffloadRecord, ...]:
        """The last moves, oldest first."""
        return self._books.history()

    # use

    def mark_active(self, pipeline: str) -> None:
        """It is in use until as many `mark_idle`: nothing evicts it. Waits for an eviction of it that is under way."""
        self._begin_use(pipeline)

    def mark_idle(self, pipeline: str) -> None:
        """One use less. After the last one, components that leave when idle do, and the threshold is looked at."""
        idle = self._books.end_use(pipeline, self._clock())
        found = self._books.find(pipeline)
        if idle:
            self._become_idle(found)

    @contextmanager
    def using(self, pipeline: str) -> Iterator[None]:
        """Active inside the block, whatever happens in it."""
        found = self._begin_use(pipeline)
        try:
            yield
        finally:
            # the entry, not the name, is looked at: it may have been unregistered inside
            if self._books.end_use(pipeline, self._clock()):
                self._become_idle(found)

    # to the card

    def ensure_on_gpu(self, pipeline: str) -> int:
        """Bring a pipeline to the card: of a video pipeline what stays there while it runs, of any other all of it.

        Room is made for what is missing only. Out of memory is met by evicting and trying again. Returns the bytes moved;
        raises torch.OutOfMemoryError when nothing is left to evict, with every component whole.
        """
        found = self._books.find(pipeline)
        components = self._books.components(found)
        if _is_video(components):
            components = [component for component in components if not component.policy.offload_between_uses]
        return self._ensure(found, components)

    def ensure_components_on_gpu(
        self, pipeline: str, roles: Iterable[ComponentRole] | None = None, names: Iterable[str] | None = None
    ) -> int:
        """Bring the components of these roles and names to the card; None means any. As `ensure_on_gpu`.

        By name, one of two experts comes and the other makes room for it where both do not fit.
        """
        of_role, named = None if roles is None else set(roles), None if names is None else set(names)
        found = self._books.find(pipeline)
        wanted = [
            component
            for component in self._books.components(found)
            if (of_role is None or component.role in of_role) and (named is None or component.name in named)
        ]
        return self._ensure(found, wanted)

    def ensure_text_encoder_on_gpu(self, pipeline: str) -> int:
        """Before a prompt is encoded."""
        return self.ensure_components_on_gpu(pipeline, (ComponentRole.TEXT_ENCODER,))

    def ensure_headroom(self, delta: int, index: int = 0, keep: Iterable[str] = ()) -> int:
        """Evict idle pipelines, least recently used first, until `delta` more bytes can be had. Returns the bytes freed.

        `delta` is new memory only, never what is loaded already. Pipelines named in `keep` stay.
        """
        return self._evict_until(lambda: self._missing(delta, index), index, frozenset(keep), "headroom")

    def evict_below_threshold(self, index: int = 0, keep: Iterable[str] = ()) -> int:
        """Evict idle pipelines but `keep` while reclaimable free memory is below the threshold. Returns the bytes freed."""
        return self._evict_until(lambda: self._missing(self.threshold, index), index, frozenset(keep), "threshold")

    # off the card

    def offload_to_cpu(self, pipeline: str, release_pins: bool = False) -> int:
        """Send a pipeline off the card, its pinned components only with `release_pins`. Returns the bytes freed.

        Raises ActivePipelineError while it is in use, PlacementError for a component that could not be moved.
        """
        found = self._books.find(pipeline)
        with found.moving:
            components = self._books.components(found)
            if self._books.in_use(found) or any(component.handle.in_use for component in components):
                raise ActivePipelineError(f"pipeline {pipeline} is in use; wait until its prompt has ended")
            leaving = [
                component for component in components if component.may_leave or (release_pins and component.policy.pin_to_gpu)
            ]
            return sum(self._unload(found, component, "asked") for component in leaving)

    def offload_text_encoder(self, pipeline: str) -> int:
        """After the prompt is encoded: the text encoder leaves, though the pipeline goes on. Returns the bytes freed."""
        found = self._books.find(pipeline)
        with found.moving:
            return sum(
                self._unload(found, component, "between uses")
                for component in self._books.components(found)
                if component.role is ComponentRole.TEXT_ENCODER and component.may_leave and not component.handle.in_use
            )

    def offload_between_uses(self, pipeline: str) -> int:
        """Before a generator comes: what leaves between its uses does, unless it is in use. Returns the bytes freed.

        Raises UnknownPipelineError, and PlacementError for a component that could not be moved.
        """
        found = self._books.find(pipeline)
        with found.moving:
            return sum(
                self._unload(found, component, "between uses")
                for component in self._books.components(found)
                if component.policy.offload_between_uses and not component.handle.in_use
            )

    def offload_component(self, key: object, release_pin: bool = False) -> int:
        """Send one model (by its handle's key) off the card because somebody asks. Returns the bytes freed.

        Raises UnknownPipelineError for a model that is not registered, ActivePipelineError for one that is in use or, without
        `release_pin`, pinned, PlacementError for one that could not be moved.
        """
        found = self._books.find_component(key)
        if found is None:
            raise UnknownPipelineError("this model is not registered; its graph may have dropped it")
        pipeline, component = found
        with pipeline.moving:
            if component.handle.in_use:
                raise ActivePipelineError(f"{component.name} is computing; wait until its node has run")
            if component.policy.pin_to_gpu and not release_pin:
                raise ActivePipelineError(f"{component.name} is pinned to the card; unpin it first")
            return self._unload(pipeline, component, "asked")

    def free_rung(self, rung: Rung, owner: str | None = None, index: int = 0) -> int:
        """What one rung of recovery frees, in bytes. `owner` is the pipeline that ran out of memory: it may shrink itself.

        Other pipelines are touched only while they are idle, pinned components only on the last rung.
        """
        return self._free_rung(rung, self._books.find(owner) if owner is not None else None, index)

    # inside

    def _begin_use(self, pipeline: str) -> Pipeline:
        found = self._books.find(pipeline)
        with found.moving:
            self._books.begin_use(found, self._clock())
        return found

    def _become_idle(self, pipeline: Pipeline) -> None:
        self._offload_idle_components(pipeline)
        for index in {component.handle.device_index for component in self._books.components(pipeline)}:
            self.evict_below_threshold(index)

    def _free(self, index: int) -> int | None:
        """Reclaimable free bytes; None where no driver answers, and then nothing is evicted for a number nobody knows."""
        try:
            return self._monitor.snapshot(index).reclaimable_free
        except (NoAcceleratorError, DeviceReadError):
            return None

    def _driver_free(self, index: int) -> int:
        try:
            return self._monitor.snapshot(index).free
        except (NoAcceleratorError, DeviceReadError):
            return 0

    def _missing(self, wanted: int, index: int) -> int:
        free = self._free(index)
        return 0 if free is None else wanted - free

    def _ensure(self, pipeline: Pipeline, components: list[Component]) -> int:
        wanted = [component for component in components if not component.policy.host_decides]
        moved = 0
        measured: dict[int, int] = {}
        with pipeline.moving:
            try:
                for component in wanted:
                    moved += self._load(pipeline, component, wanted, measured)
            finally:
                self._books.touch(pipeline, self._clock())
                for index, delta in measured.items():
                    self._monitor.record_pipeline_load(pipeline.name, delta, index)
        for index in measured:
            self.evict_below_threshold(index, keep=(pipeline.name,))
        return moved

    def _load(self, pipeline: Pipeline, component: Component, wanted: list[Component], measured: dict[int, int]) -> int:
        """Bring one component; adds what the card then had less of to `measured`, by card."""
        handle = component.handle
        index = handle.device_index
        delta = handle.total_bytes() - handle.bytes_on_card()
        if delta <= 0:
            return 0
        self.ensure_headroom(delta, index, keep=(pipeline.name,))
        freed = 0

        def load() -> int:
            # measured around the load alone: what others gave up for it is theirs
            before = self._free(index)
            moved = self._move(pipeline, component, handle.load, "asked")
            after = self._free(index)
            measured[index] = measured.get(index, 0) + (moved if before is None or after is None else before - after)
            return moved

        def free(rung: Rung) -> int:
            nonlocal freed
            # what is being brought to the card is not sent away for its own sake
            freed += self._free_rung(rung, pipeline, index, stays=wanted)
            # three retries do not reach five rungs: none is spent while it is known that the load still can't fit
            if self._missing(delta, index) > 0 and rung is not Rung.PINS:
                return 0
            since_last_retry, freed = freed, 0
            return since_last_retry

        moved = run_with_recovery(load, free)
        self._monitor.record_component_vram(pipeline.name, component.name, handle.bytes_on_card(), index)
        return moved

    def _free_rung(self, rung: Rung, owner: Pipeline | None, index: int, stays: Iterable[Component] = ()) -> int:
        if rung is Rung.CACHE:
            # the driver's own number: cached blocks count as reclaimable already, yet can be in the way of a large one
            before = self._driver_free(index)
            self._cleanup()
            return max(0, self._driver_free(index) - before)
        keep = frozenset() if owner is None else frozenset((owner.name,))
        if rung is Rung.IDLE_PIPELINES:
            return self._evict_until(lambda: None, index, keep, "out of memory")
        freed = 0
        if rung is Rung.PINS:
            freed = self._evict_until(lambda: None, index, keep, "out of memory", pins=True)
        return freed + (self._shrink(owner, rung, index, {component.handle.key for component in stays}) if owner else 0)

    def _shrink(self, owner: Pipeline, rung: Rung, index: int, stays: set[object]) -> int:
        """The pipeline that ran out of memory gives up its own text encoder, half of its generator, or its pins."""
        freed = 0
        with owner.moving:
            for component in self._books.components(owner):
                handle = component.handle
                # its host still counts the generator whose step failed as in use
                leaves = {
                    Rung.TEXT_ENCODER: component.role is ComponentRole.TEXT_ENCODER and not handle.in_use,
                    Rung.PART_OF_GENERATOR: component.role is ComponentRole.GENERATOR,
                    Rung.PINS: component.policy.pin_to_gpu and not handle.in_use,
                }[rung] and (component.may_leave or rung is Rung.PINS)
                # each allocation evicts elastic pages before it fails, so there is nothing more to be had from them
                leaves = leaves and not handle.elastic
                if leaves and handle.device_index == index and handle.key not in stays:
                    half = (handle.bytes_on_card() + 1) // 2
                    part = half if rung is Rung.PART_OF_GENERATOR else None
                    freed += self._try_unload(owner, component, "out of memory", part)
        return freed

    def _offload_idle_components(self, pipeline: Pipeline) -> int:
        """What leaves when its pipeline is idle does; a component that can't be moved stays, and the log says so."""
        freed = 0
        with pipeline.moving:
            for component in self._books.components(pipeline):
                wanted = component.policy.offload_when_idle and component.may_leave and not component.handle.in_use
                if wanted and self._books.may_leave(pipeline, component):
                    freed += self._try_unload(pipeline, component, "idle")
        return freed

    def _evict_until(
        self, missing: Callable[[], int | None], index: int, keep: frozenset[str], reason: str, pins: bool = False
    ) -> int:
        """Evict idle pipelines by age while `missing` says that bytes are; None means all that may leave."""
        asked = missing()
        freed = 0

        def short() -> int | None:
            """Bytes still to go: by the card, and never more than was missing at first, should the card's numbers be old."""
            now = missing()
            return None if now is None or asked is None else min(now, asked - freed)

        for pipeline in self._books.idle_by_age(keep):
            # somebody moves it right now: waiting for that while holding another pipeline could wait for ever
            if not pipeline.moving.acquire(blocking=False):
                continue
            try:
                components = self._books.components(pipeline)
                if any(component.handle.in_use for component in components):
                    continue
                for component in sorted(components, key=lambda component: component.policy.priority):
                    left = short()
                    if left is not None and left <= 0:
                        return freed
                    if self._is_victim(pipeline, component, index, pins):
                        freed += self._try_unload(pipeline, component, reason, left)
            finally:
                pipeline.moving.release()
        return freed

    def _is_victim(self, pipeline: Pipeline, component: Component, index: int, pins: bool) -> bool:
        handle = component.handle
        if handle.elastic or handle.device_index != index or component.policy.host_decides:
            return False
        # asked for each component anew: a use of the pipeline may have begun, or another pipeline have taken the model
        return (component.policy.pin_to_gpu if pins else component.may_leave) and self._books.may_leave(pipeline, component)

    def _try_unload(self, pipeline: Pipeline, component: Component, reason: str, nbytes: int | None = None) -> int:
        try:
            return self._unload(pipeline, component, reason, nbytes)
        except PlacementError as error:
            logger.warning("%s", error)
            return 0

    def _unload(self, pipeline: Pipeline, component: Component, reason: str, nbytes: int | None = None) -> int:
        handle = component.handle
        if handle.bytes_on_card() == 0:
            return 0
        before = self._free(handle.device_index)
        try:
            freed = self._move(pipeline, component, lambda: handle.unload(nbytes), reason)
        except self.interrupts:
            raise
        except Exception as error:
            raise PlacementError(
                f"{component.name} of pipeline {pipeline.name} could not leave the card and stays there whole: {error}"
            ) from error
        after = self._free(handle.device_index)
        if before is not None and after is not None:
            self._monitor.record_pipeline_unload(pipeline.name, after - before, handle.device_index)
        self._monitor.record_component_vram(pipeline.name, component.name, handle.bytes_on_card(), handle.device_index)
        return freed

    def _move(self, pipeline: Pipeline, component: Component, move: Callable[[], int], reason: str) -> int:
        """One move, noted with what came of it."""
        handle = component.handle
        started, moved, failure = self._clock(), 0, None
        source = placement_of(handle.total_bytes(), handle.bytes_on_card())
        try:
            # the same model may have been registered anew, with another pipeline's lock
            with self._books.model_lock(handle.key):
                moved = move()
            return moved
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            record = ComponentOffloadRecord(
                pipeline=pipeline.name,
                component=component.name,
                role=component.role,
                source=source,
                target=placement_of(handle.total_bytes(), handle.bytes_on_card()),
                bytes=moved,
                seconds=self._clock() - started,
                reason=reason,
                error=failure,
            )
            self._books.note(record)
            if failure is None and moved:
                logger.info("%s: %s now on %s (%s, %s)", pipeline.name, component.name, record.target, say_gib(moved), reason)


def _is_video(components: list[Component]) -> bool:
    """Parts can be placed one by one: there is a generator, and something it does not need all the time."""
    roles = {component.role for component in components}
    return ComponentRole.GENERATOR in roles and bool(roles & {ComponentRole.TEXT_ENCODER, ComponentRole.VAE})


def empty_cache() -> None:
    """Collect garbage and give the allocator's cached blocks back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        torch.xpu.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


_offloader: VRAMOffloader | None = None
_offloader_lock = threading.Lock()


def get_vram_offloader() -> VRAMOffloader:
    """The offloader of this process."""
    global _offloader
    with _offloader_lock:
        if _offloader is None:
            _offloader = VRAMOffloader(get_vram_monitor())
        return _offloader
