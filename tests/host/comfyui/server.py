"""The server custom nodes know as `PromptServer.instance`: ComfyUI's routes, websocket and queue."""

import asyncio
import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

import execution
import nodes
from aiohttp import WSMsgType, web
from standin import routes_frontend, routes_host, routes_jobs, routes_user
from standin.journal import journal

FEATURES = {
    "supports_preview_metadata": True,
    "max_upload_size": 100 * 2**20,
    "extension": {"manager": {"supports_v4": False}},
    "node_replacements": False,
    "assets": False,
}


@web.middleware
async def cache_control(request: web.Request, handler: Any) -> web.StreamResponse:
    """Scripts and styles are asked for anew each time, as ComfyUI has it for development."""
    response = await handler(request)
    if request.path.endswith((".js", ".css", ".html")) or request.path == "/":
        response.headers.setdefault("Cache-Control", "no-cache")
    return response


class PromptServer:
    instance: "PromptServer"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        PromptServer.instance = self
        self.loop = loop
        self.prompt_queue = execution.PromptQueue(self)
        self.user_manager = routes_user.UserManager()
        self.messages: asyncio.Queue[tuple[str, Any, str | None]] = asyncio.Queue()
        self.number = 0
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.sockets_metadata: dict[str, dict[str, Any]] = {}
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.on_prompt_handlers: list[Callable[[dict[str, Any]], dict[str, Any]]] = []
        self.app = web.Application(client_max_size=FEATURES["max_upload_size"], middlewares=[cache_control])
        self.routes = web.RouteTableDef()
        self.web_root = str(routes_frontend.static_folder())
        self.routes.get("/ws")(self._websocket)
        self.routes.get("/prompt")(self._get_prompt)
        self.routes.post("/prompt")(self._post_prompt)
        self.routes.get("/features")(self._features)
        self.routes.get("/object_info")(self._object_info)
        self.routes.get("/object_info/{node_class}")(self._object_info_of)

    # What custom nodes call.

    def add_on_prompt_handler(self, handler: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.on_prompt_handlers.append(handler)

    def trigger_on_prompt(self, json_data: dict[str, Any]) -> dict[str, Any]:
        for handler in self.on_prompt_handlers:
            try:
                json_data = handler(json_data)
            except Exception:
                logging.warning("[ERROR] An error occurred during the on_prompt_handler processing")
                logging.warning(traceback.format_exc())
        return json_data

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        """From any thread; `sid` None sends to everybody."""
        journal.note("message", event=event, data=data)
        self.loop.call_soon_threadsafe(self.messages.put_nowait, (event, data, sid))

    def queue_updated(self) -> None:
        self.send_sync("status", {"status": self.get_queue_info()})

    def get_queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.prompt_queue.get_tasks_remaining()}}

    # Serving.

    def add_routes(self) -> None:
        """After the custom nodes: every route that is not static also under /api."""
        routes_frontend.add(self.routes, self.web_root)
        routes_user.add(self.routes, self.user_manager.settings.values)
        routes_jobs.add(self.routes, self)
        routes_host.add(self.routes, self)
        api = web.RouteTableDef()
        for route in self.routes:
            if isinstance(route, web.RouteDef):
                api.route(route.method, "/api" + route.path)(route.handler, **route.kwargs)
        self.app.add_routes(api)
        self.app.add_routes(self.routes)
        for name, folder in nodes.EXTENSION_WEB_DIRS.items():
            self.app.add_routes([web.static(f"/extensions/{name}", folder, follow_symlinks=True)])
        routes_frontend.add_static(self.app, self.web_root)

    async def publish_loop(self) -> None:
        while True:
            event, data, sid = await self.messages.get()
            await self.send(event, data, sid)

    async def send(self, event: str, data: Any, sid: str | None = None) -> None:
        sockets = list(self.sockets.values()) if sid is None else [self.sockets[sid]] if sid in self.sockets else []
        for socket in sockets:
            try:
                await socket.send_json({"type": event, "data": data})
            except (ConnectionError, RuntimeError) as error:
                logging.warning("send error: %s", error)

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId") or uuid.uuid4().hex
        self.sockets[sid] = socket
        self.sockets_metadata[sid] = {"feature_flags": {}}
        try:
            await self.send("status", {"status": self.get_queue_info(), "sid": sid}, sid)
            if self.client_id == sid and self.last_node_id is not None:
                await self.send("executing", {"node": self.last_node_id}, sid)
            first = True
            async for message in socket:
                if message.type is WSMsgType.TEXT and first:
                    await self._negotiate(sid, message.data)
                    first = False
        finally:
            if self.sockets.get(sid) is socket:
                del self.sockets[sid], self.sockets_metadata[sid]
        return socket

    async def _negotiate(self, sid: str, text: str) -> None:
        try:
            message = json.loads(text)
        except json.JSONDecodeError:
            logging.warning("Invalid JSON received from client %s: %s", sid, text)
            return
        if message.get("type") == "feature_flags":
            self.sockets_metadata[sid]["feature_flags"] = message.get("data", {})
            await self.send("feature_flags", FEATURES, sid)

    # Prompts.

    async def _get_prompt(self, request: web.Request) -> web.Response:
        return web.json_response(self.get_queue_info())

    async def _post_prompt(self, request: web.Request) -> web.Response:
        journal.note("post_prompt")
        body = await request.json()
        journal.note("prompt_hook", handlers=len(self.on_prompt_handlers))
        body = self.trigger_on_prompt(body)
        number = self._number(body)
        if "prompt" not in body:
            return _refusal("no_prompt", "No prompt provided", "No prompt provided")
        prompt_id = body.get("prompt_id")
        if prompt_id is None:
            prompt_id = str(uuid.uuid4())
        elif not _is_canonical_uuid(prompt_id):
            details = (
                "prompt_id must be a UUID string in canonical lowercase hyphenated form; omit it to let the server generate one"
            )
            return _refusal("invalid_prompt_id", "prompt_id must be a valid UUID", details)
        prompt = body["prompt"]
        journal.note("validation_start", prompt_id=prompt_id)
        valid, error, outputs, node_errors = await execution.validate_prompt(
            prompt_id, prompt, body.get("partial_execution_targets")
        )
        journal.note("validation_end", prompt_id=prompt_id, valid=valid)
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if not valid:
            logging.warning("invalid prompt: %s", error)
            return web.json_response({"error": error, "node_errors": node_errors}, status=400)
        secret = execution.SENSITIVE_EXTRA_DATA_KEYS
        sensitive = {key: extra_data.pop(key) for key in secret if key in extra_data}
        extra_data["create_time"] = int(time.time() * 1000)
        self.prompt_queue.put((number, prompt_id, prompt, extra_data, outputs, sensitive))
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})

    def _number(self, body: dict[str, Any]) -> float:
        if "number" in body:
            return float(body["number"])
        number = -self.number if body.get("front") else self.number
        self.number += 1
        return number

    async def _features(self, request: web.Request) -> web.Response:
        return web.json_response(FEATURES)

    # What nodes there are.

    async def _object_info(self, request: web.Request) -> web.Response:
        known = {}
        for name in nodes.NODE_CLASS_MAPPINGS:
            try:
                known[name] = node_info(name)
            except Exception:
                logging.error("[ERROR] An error occurred while retrieving information for the '%s' node.", name)
                logging.error(traceback.format_exc())
        return web.json_response(known)

    async def _object_info_of(self, request: web.Request) -> web.Response:
        name = request.match_info["node_class"]
        return web.json_response({name: node_info(name)} if name in nodes.NODE_CLASS_MAPPINGS else {})


def node_info(name: str) -> dict[str, Any]:
    """What /object_info says of one node: the recorded words of a real ComfyUI, or built from the class as it would."""
    node_class = nodes.NODE_CLASS_MAPPINGS[name]
    if getattr(node_class, "RECORDED", False):
        from standin import definitions

        return {"description": "", "search_aliases": []} | definitions.object_info(name)
    inputs = node_class.INPUT_TYPES()
    returns = node_class.RETURN_TYPES
    info: dict[str, Any] = {
        "input": inputs,
        "input_order": {category: list(definitions) for category, definitions in inputs.items()},
        "is_input_list": getattr(node_class, "INPUT_IS_LIST", False),
        "output": returns,
        "output_is_list": getattr(node_class, "OUTPUT_IS_LIST", [False] * len(returns)),
        "output_name": getattr(node_class, "RETURN_NAMES", returns),
        "name": name,
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name, name),
        "description": getattr(node_class, "DESCRIPTION", ""),
        "python_module": getattr(node_class, "RELATIVE_PYTHON_MODULE", "nodes"),
        "category": getattr(node_class, "CATEGORY", "sd"),
        "output_node": getattr(node_class, "OUTPUT_NODE", False) is True,
        "has_intermediate_output": getattr(node_class, "HAS_INTERMEDIATE_OUTPUT", False) is True,
        "search_aliases": getattr(node_class, "SEARCH_ALIASES", []),
    }
    if hasattr(node_class, "OUTPUT_TOOLTIPS"):
        info["output_tooltips"] = node_class.OUTPUT_TOOLTIPS
    for flag in ("DEPRECATED", "EXPERIMENTAL", "DEV_ONLY"):
        if getattr(node_class, flag, False):
            info[flag.lower()] = True
    return info


def _refusal(kind: str, message: str, details: str) -> web.Response:
    error = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return web.json_response({"error": error, "node_errors": {}}, status=400)


def _is_canonical_uuid(value: Any) -> bool:
    try:
        return isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        return False
