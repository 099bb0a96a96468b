"""ComfyUI's web server: routes, the middleware around POST /prompt, and the prompt handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web
from server import PromptServer

from .seams import EVENTS, MIDDLEWARE, PROMPT_HANDLER, QUEUE, ROUTES, USER_SETTINGS, SeamTable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CLAIM = "vram_headroom_folder"
"""Set on the server: a second copy of the pack would serve nobody and register models in books that nobody reads."""

PROMPT_PATHS = frozenset({"/prompt", "/api/prompt"})


class QueuedPrompt(NamedTuple):
    """A prompt that waits or runs."""

    prompt_id: str
    prompt: object
    outputs: tuple[str, ...]
    """Output nodes that are run."""
    running: bool


class HostServer:
    """The running PromptServer. Everything is added while custom nodes are imported: later the application is frozen."""

    def __init__(self, seams: SeamTable) -> None:
        self._instance = getattr(PromptServer, "instance", None)
        self._seams = seams
        seams.note(EVENTS, live=callable(getattr(self._instance, "send_sync", None)))

    def send(self, event: str, data: object, client_id: str) -> bool:
        """Send a message over the websocket to this client alone, from any thread; a client that is gone is sent nothing."""
        send: Callable[..., None] | None = getattr(self._instance, "send_sync", None)
        if not self._seams.live(EVENTS) or send is None:
            return False
        send(event, data, client_id)
        return True

    def claim(self, folder: str) -> str | None:
        """Take this ComfyUI for the copy of the pack in `folder`; the folder of the copy that has it already, if one has."""
        holder = getattr(self._instance, CLAIM, None)
        if holder is None and self._instance is not None:
            setattr(self._instance, CLAIM, folder)
        return holder

    def add_route(self, method: str, path: str, handler: Handler) -> bool:
        """Serve `path`, and `/api` + `path`, as ComfyUI does with all its routes."""
        routes = getattr(self._instance, "routes", None)
        if self._seams.note(ROUTES, live=routes is not None) and routes is not None:
            routes.route(method, path)(handler)
            return True
        return False

    def around_prompt_posts(self, around: Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]) -> bool:
        """Run `around` for every POST of a prompt, whichever client sends it."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method == "POST" and request.path in PROMPT_PATHS:
                return await around(request, handler)
            return await handler(request)

        app = getattr(self._instance, "app", None)
        open_app = app is not None and not app.frozen
        if self._seams.note(MIDDLEWARE, live=open_app) and app is not None:
            app.middlewares.append(middleware)
            return True
        return False

    def setting(self, request: web.Request, name: str) -> object:
        """What the user who sends `request` has chosen in ComfyUI's settings; None where that is nothing or can't be read."""
        manager = getattr(self._instance, "user_manager", None)
        stored = getattr(manager, "settings", None)
        read = getattr(stored, "get_settings", None)
        if not self._seams.knows(USER_SETTINGS):
            self._seams.note(USER_SETTINGS, live=callable(read))
        if read is None or not self._seams.live(USER_SETTINGS):
            return None
        try:
            values = read(request)
        except web.HTTPException:
            return None  # a user ComfyUI does not know
        return values.get(name) if isinstance(values, dict) else None

    def queued(self) -> tuple[QueuedPrompt, ...]:
        """The prompts that run and wait, in the order they will run; none where that can't be read."""
        read = getattr(getattr(self._instance, "prompt_queue", None), "get_current_queue_volatile", None)
        if not self._seams.knows(QUEUE):
            self._seams.note(QUEUE, live=callable(read))
        if read is None or not self._seams.live(QUEUE):
            return ()
        running, pending = read()
        # the waiting ones are a heap: by number, then by id
        items = [*((item, True) for item in running), *((item, False) for item in sorted(pending, key=lambda item: item[:2]))]
        return tuple(
            QueuedPrompt(str(item[1]), item[2], tuple(str(node) for node in item[4] or ()), runs)
            for item, runs in items
            if len(item) > 4
        )

    def on_prompt(self, handler: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
        """Let `handler` see and return every prompt's body before it is validated."""
        add = getattr(self._instance, "add_on_prompt_handler", None)
        if self._seams.note(PROMPT_HANDLER, live=callable(add)) and callable(add):
            add(handler)
            return True
        return False
