"""REST of the panel: who watches, and what a person asks of models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from aiohttp import web

from .actions import ActionKind, Actions, Asked, ModelBusyError, UnknownModelError
from .events import Events
from .host.server import Handler, HostServer
from .requests import RequestError, check_same_site, json_object, refusal
from .routes import STATUS_PATH

WATCH_PATH: Final = f"{STATUS_PATH}/watch"
OFFLOAD_PATH: Final = f"{STATUS_PATH}/offload"
PIN_PATH: Final = f"{STATUS_PATH}/pin"
UNPIN_PATH: Final = f"{STATUS_PATH}/unpin"
FREE_PATH: Final = f"{STATUS_PATH}/free"
ACTION_PATH: Final = f"{STATUS_PATH}/actions/{{id}}"

PATIENCE_S: Final = 2.0
"""An answer waits this long for what is done at once: 14 GB over PCIe 4 take about half of it."""

LONGEST_CLIENT_ID: Final = 128
"""ComfyUI's own are 32 letters."""


KeyOf = Callable[[dict[str, Any]], int | None]


class PanelRoutes:
    """The handlers. Models and cards are looked at in a worker thread, never on ComfyUI's event loop."""

    def __init__(self, events: Events, actions: Actions) -> None:
        self._events = events
        self._actions = actions

    async def watch(self, request: web.Request) -> web.Response:
        """A heartbeat: 200 with what is to be shown now; 204 for one that ends the watching."""
        try:
            check_same_site(request)
            body = await json_object(request)
            client_id, watching = _client_id(body), _flag(body, "watching", True)
        except RequestError as error:
            return refusal(error)
        if not watching:
            self._events.leave(client_id)
            return web.Response(status=204)
        answer = await asyncio.to_thread(self._events.watch, client_id)
        return web.json_response({"status": answer.status, "run": answer.run})

    def on_model(self, kind: ActionKind) -> Handler:
        """The handler of an action on one model."""

        async def handle(request: web.Request) -> web.Response:
            return await self._act(request, kind, _key)

        return handle

    async def free(self, request: web.Request) -> web.Response:
        """Send off the card what is idle."""
        return await self._act(request, "free", lambda body: None)

    async def action(self, request: web.Request) -> web.Response:
        """What became of an action."""
        found = self._actions.find(request.match_info["id"])
        if found is None:
            return refusal(RequestError(404, "unknown_action", "no action of this id is remembered"))
        return web.json_response(
            {"id": found.id, "state": found.state, "freed_bytes": found.freed, "message": found.message or None}
        )

    async def _act(
        self, request: web.Request, kind: ActionKind, key_of: Callable[[dict[str, Any]], int | None]
    ) -> web.Response:
        try:
            check_same_site(request)
            key = key_of(await json_object(request))
            return await self._answer(*await asyncio.to_thread(self._actions.ask, kind, key))
        except UnknownModelError as error:
            return refusal(RequestError(404, "unknown_model", str(error)))
        except ModelBusyError as error:
            return refusal(RequestError(409, error.kind, str(error)))
        except RequestError as error:
            return refusal(error)

    async def _answer(self, asked: Asked, ended: Future[None]) -> web.Response:
        awaited = self._actions.awaited()
        if asked.state == "waiting" and awaited == "queue":
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(ended)), PATIENCE_S)
            except (TimeoutError, asyncio.TimeoutError):
                awaited = self._actions.awaited()
        now = self._actions.find(asked.id) or asked
        if now.state == "refused":
            raise RequestError(409, "refused", now.message)
        if now.state == "done":
            return web.json_response({"done": True, "freed_bytes": now.freed})
        return web.json_response({"id": asked.id, "waiting": awaited}, status=202)


def add(server: HostServer, routes: PanelRoutes) -> None:
    """Serve them."""
    server.add_route("POST", WATCH_PATH, routes.watch)
    server.add_route("POST", OFFLOAD_PATH, routes.on_model("offload"))
    server.add_route("POST", PIN_PATH, routes.on_model("pin"))
    server.add_route("POST", UNPIN_PATH, routes.on_model("unpin"))
    server.add_route("POST", FREE_PATH, routes.free)
    server.add_route("GET", ACTION_PATH, routes.action)


def _client_id(body: dict[str, Any]) -> str:
    found = body.get("client_id")
    if not isinstance(found, str) or not 0 < len(found) <= LONGEST_CLIENT_ID:
        raise RequestError(400, "bad_client_id", f"client_id is not a text of 1 to {LONGEST_CLIENT_ID} letters")
    return found


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    found = body.get(name, default)
    if not isinstance(found, bool):
        raise RequestError(400, f"bad_{name}", f"{name} is neither true nor false")
    return found


def _key(body: dict[str, Any]) -> int:
    found = body.get("key")
    if not isinstance(found, int) or isinstance(found, bool):
        raise RequestError(400, "bad_key", "key is not a whole number; send the key that the status gives a model")
    return found
