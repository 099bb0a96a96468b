"""What a person asks of models in the panel: offload, pin, unpin, free. Done on ComfyUI's worker thread, never beside it."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from ..vram.books import Component, UnknownPipelineError
from ..vram.components import ComponentRole
from ..vram.offloader import ActivePipelineError, PlacementError
from ..vram.policy import hosted_policy
from ..vram.recovery import Rung
from ..vram.status import WaitingAction
from .host.handle import OnCard
from .host.seams import IDLE_QUEUE, NODE_SPAN
from .pack import Pack

logger = logging.getLogger("vram_headroom")

ActionKind = Literal["offload", "pin", "unpin", "free"]
ActionState = Literal["waiting", "done", "refused"]
Awaited = Literal["node", "queue"]

ACTIONS_KEPT: Final = 64
"""Actions whose end can still be asked for."""

GONE: Final = "no model of this key is loaded or registered; it may have left since the panel was drawn"


class UnknownModelError(LookupError):
    """No model of this key is there."""


class ModelBusyError(RuntimeError):
    """The model can't be sent away now; the message says why and what to do."""

    def __init__(self, kind: Literal["in_use", "pinned"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Asked(NamedTuple):
    """An action at one moment."""

    id: str
    kind: ActionKind
    state: ActionState
    freed: int
    message: str


@dataclass(slots=True)
class _Action:
    kind: ActionKind
    key: int | None
    name: str | None
    asked_at: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: ActionState = "waiting"
    freed: int = 0
    message: str = ""
    ended: Future[None] = field(default_factory=Future)

    def asked(self) -> Asked:
        return Asked(self.id, self.kind, self.state, self.freed, self.message)


class Actions:
    """Takes actions from any thread."""

    def __init__(self, pack: Pack, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called whenever an action has been done, or waits."""
        self._pack = pack
        self._changed = changed
        self._lock = threading.Lock()
        self._actions: OrderedDict[str, _Action] = OrderedDict()
        pack.waiting = self.waiting

    def ask(self, kind: ActionKind, key: int | None = None) -> tuple[Asked, Future[None]]:
        """Begin an action on the model of this key; None: on all that are idle. The future is done when it has ended.

        One that waits already is not begun twice. Raises UnknownModelError, and ModelBusyError for a model that a node computes
        with.
        """
        component, loaded = self._find(key)
        action = _Action(kind, key, _name(component, loaded), self._pack.monitor.now())
        if kind in ("pin", "unpin") and (component is not None or kind == "unpin"):
            # a rule is written down and nothing is touched: no node need end for that
            self._pin(key, pinned=kind == "pin")
            self._end(action, "done", 0, "")
            return action.asked(), action.ended
        if kind == "offload":
            _check_idle(component, loaded)
        with self._lock:
            waiting = (one for one in self._actions.values() if one.state == "waiting")
            known = next((one for one in waiting if (one.kind, one.key) == (kind, key)), None)
            if known is None:
                self._keep(action)
        if known is not None:
            return known.asked(), known.ended
        self._pack.host.worker.submit(lambda: self._do(action))
        self._changed()
        return action.asked(), action.ended

    def find(self, action_id: str) -> Asked | None:
        """An action by its id; None for one that never was, or ended long ago."""
        with self._lock:
            found = self._actions.get(action_id)
            return found.asked() if found is not None else None

    def waiting(self) -> tuple[WaitingAction, ...]:
        """Those that wait, the longest first."""
        now = self._pack.monitor.now()
        with self._lock:
            return tuple(
                WaitingAction(one.id, one.kind, one.key, one.name, round(max(0.0, now - one.asked_at), 3))
                for one in self._actions.values()
                if one.state == "waiting"
            )

    def awaited(self) -> Awaited:
        """What an action waits for that is asked for now: the end of the running node, or an idle queue."""
        host = self._pack.host
        if host.execution.running is not None:
            return "node" if host.seams.live(NODE_SPAN) else "queue"
        return "queue" if host.seams.live(IDLE_QUEUE) else "node"

    def _keep(self, action: _Action) -> None:
        self._actions[action.id] = action
        ended = [one.id for one in self._actions.values() if one.state != "waiting"]
        for action_id in ended[: max(0, len(self._actions) - ACTIONS_KEPT)]:
            del self._actions[action_id]

    def _find(self, key: int | None) -> tuple[Component | None, OnCard | None]:
        """As it is registered, and as the host has it loaded. Raises UnknownModelError where it is neither."""
        if key is None:
            return None, None
        component = self._component(key)
        loaded = self._pack.host.models.find(key)
        if component is None and loaded is None:
            raise UnknownModelError(GONE)
        return component, loaded

    def _component(self, key: int | None) -> Component | None:
        return next((one for _, one in self._pack.offloader.components() if one.handle.key == key), None)

    def _end(self, action: _Action, state: ActionState, freed: int, message: str) -> None:
        with self._lock:
            action.state, action.freed, action.message = state, freed, message
        action.ended.set_result(None)
        self._changed()

    # on the worker thread

    def _do(self, action: _Action) -> None:
        try:
            freed = self._act(action)
        except (UnknownModelError, ModelBusyError, UnknownPipelineError, ActivePipelineError, PlacementError) as error:
            logger.info("%s", error)
            self._end(action, "refused", 0, str(error))
        except BaseException as error:
            self._end(action, "refused", 0, f"it was broken off: {error or type(error).__name__}")
            raise
        else:
            self._end(action, "done", freed, "")

    def _act(self, action: _Action) -> int:
        """Returns the bytes freed."""
        pack = self._pack
        if action.kind == "free":
            freed, stayed = offload_idle(pack)
            if stayed:
                logger.info("%s stayed on the card", ", ".join(stayed))
            for card in pack.monitor.accelerators:
                pack.offloader.free_rung(Rung.CACHE, index=card.index)
            return freed
        component, loaded = self._find(action.key)
        if action.kind == "pin":
            self._register(action)
            self._pin(action.key, pinned=True)
            return 0
        if component is not None:
            return pack.offloader.offload_component(action.key)
        _check_idle(component, loaded)
        return pack.host.models.unload(lambda key, role: key == action.key)

    def _register(self, action: _Action) -> None:
        """A model of a stock loader, as Register Model does: pins are rules of registered models."""
        if self._component(action.key) is not None or action.key is None:
            return
        found = self._pack.host.models.adopt(action.key)
        if found is None:
            raise UnknownModelError(GONE)
        name, role, handle = found
        self._pack.offloader.register(STOCK_PIPELINE, name, role, handle, None, hosted_policy(role, handle.elastic))

    def _pin(self, key: int | None, pinned: bool) -> None:
        if self._pack.offloader.set_pin(key, pinned):
            logger.info("%s in the panel: %s", "pinned" if pinned else "unpinned", getattr(self._component(key), "name", ""))


STOCK_PIPELINE: Final = "wan"
"""Where a pinned model of a stock loader is shown: the pipeline of the loaders' and Component Policy's default."""


def _check_idle(component: Component | None, loaded: OnCard | None) -> None:
    """Raises ModelBusyError for a model that can't be sent away now."""
    computes = component.handle.in_use if component is not None else loaded is not None and loaded.in_use
    if computes:
        raise ModelBusyError("in_use", f"{_name(component, loaded)} is computing; wait until its node has run")
    if component is not None and component.policy.pin_to_gpu:
        raise ModelBusyError("pinned", f"{component.name} is pinned to the card; unpin it first")


def _name(component: Component | None, loaded: OnCard | None) -> str | None:
    if component is not None:
        return component.name
    return None if loaded is None else os.path.basename(loaded.file) if loaded.file else loaded.name


def offload_idle(pack: Pack, roles: set[ComponentRole] | None = None) -> tuple[int, list[str]]:
    """Send what no node computes with off the card, of these roles or of all; pinned models stay. Worker thread only.

    Returns the bytes freed, and the registered models that could not leave.
    """
    offloader = pack.offloader
    freed, stayed, known = 0, list[str](), set[object]()
    for _, component in offloader.components():
        known.add(component.handle.key)
        if roles is not None and component.role not in roles:
            continue
        try:
            freed += offloader.offload_component(component.handle.key)
        except (ActivePipelineError, PlacementError) as error:
            logger.info("%s", error)
            stayed.append(component.name)
        except UnknownPipelineError:
            continue  # its graph has dropped it meanwhile
    # models of stock loaders, which no pipeline knows
    return freed + pack.host.models.unload(lambda key, role: key not in known and (roles is None or role in roles)), stayed
