"""A custom node pack for tests: writes down the order of events while a prompt runs, in a real ComfyUI or in the stand-in.

GET /probe/events answers {"events": [...], "keys": {...}}; with ?until=TEXT it waits for the first event that starts with TEXT.
POST /probe/reset forgets; POST /probe/hold {"at": TEXT} stops the worker thread right after the next message that starts with
TEXT has been sent, until POST /probe/release; POST /probe/oom makes the next application of a diffusion model fail.

It asks of the host, besides what surface.txt lists: comfy.sampler_helpers.prepare_model_patcher(model, conds, model_options) is
called through its module before sampling, and what is then in model_options["transformer_options"]["wrappers"] is called.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import execution
import torch
from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

_SERVER = PromptServer.instance
_NODES = importlib.import_module("nodes")  # the host's; this pack has a package of that name
_HOLD_LIMIT_S = 60  # a forgotten release must not leave a worker behind


class _Waiter(NamedTuple):
    start: str
    found: asyncio.Future[None]


class _Journal:
    """The events so far. Written on the event loop and on the worker thread, read on the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[str] = []
        self._keys: dict[str, set[str]] = {}
        self._waiters: list[_Waiter] = []
        self.applied = 0
        self.fail_next_apply = False
        self._hold_at: str | None = None
        self._released = threading.Event()

    def add(self, event: str) -> None:
        with self._lock:
            self._events.append(event)
            due = [w for w in self._waiters if event.startswith(w.start)]
        for waiter in due:
            _SERVER.loop.call_soon_threadsafe(_finish, waiter.found)

    def add_keys(self, name: str, data: Any) -> None:
        with self._lock:
            self._keys.setdefault(name, set()).add(" ".join(sorted(data)) if isinstance(data, dict) else type(data).__name__)

    def reset(self) -> None:
        with self._lock:
            self._events, self._keys = [], {}

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return {"events": list(self._events), "keys": {name: sorted(sets) for name, sets in self._keys.items()}}

    async def wait_for(self, start: str) -> None:
        waiter = _Waiter(start, asyncio.get_running_loop().create_future())
        with self._lock:
            self._waiters.append(waiter)
            seen = any(event.startswith(start) for event in self._events)
        if not seen:
            await waiter.found
        with self._lock:
            self._waiters.remove(waiter)

    def hold_at(self, start: str) -> None:
        self._released.clear()
        self._hold_at = start

    def release(self) -> None:
        self._hold_at = None
        self._released.set()

    def hold_here(self, event: str) -> None:
        if self._hold_at is not None and event.startswith(self._hold_at):
            self._hold_at = None
            self._released.wait(_HOLD_LIMIT_S)


def _finish(found: asyncio.Future[None]) -> None:
    if not found.done():
        found.set_result(None)


_JOURNAL = _Journal()


def _here() -> str:
    context = get_executing_context()
    return "-" if context is None else str(context.node_id)


def _ids(values: Any) -> str:
    return ",".join(sorted(map(str, values), key=lambda value: (len(value), value))) or "-"


# messages


def _message(event: str, data: dict[str, Any]) -> str:
    """The part of a message that is the same in each run: no times, no prompt ids, no prose."""
    if event == "status":
        return str(data["status"]["exec_info"]["queue_remaining"])
    if event == "executing":
        return "-" if data["node"] is None else data["node"]
    if event == "executed":
        output = data["output"] or {}
        return " ".join([data["node"], *(f"{key}={len(output[key])}" for key in sorted(output))])
    if event == "execution_cached":
        return _ids(data["nodes"])
    if event == "execution_interrupted":
        return f"{data['node_id']} {data['node_type']} after {_ids(data['executed'])}"
    if event == "execution_error":
        return f"{data['node_id']} {data['node_type']} {data['exception_type']} after {_ids(data['executed'])}"
    if event == "progress":
        return f"{data['node']} {data['value']}/{data['max']}"
    if event == "progress_state":
        states = {state: [n for n, d in data["nodes"].items() if d["state"] == state] for state in ("running", "error")}
        finished = sum(d["state"] == "finished" for d in data["nodes"].values())
        return f"{_ids(states['running'])} {finished}" + (f" error {_ids(states['error'])}" if states["error"] else "")
    return ""


def _watch_messages() -> None:
    send_sync = _SERVER.send_sync

    @functools.wraps(send_sync)
    def watched(event: Any, data: Any, sid: str | None = None) -> None:
        if not isinstance(event, str):  # a preview image
            send_sync(event, data, sid)
            return
        _JOURNAL.add_keys(event, data)
        if event == "status":
            _JOURNAL.add_keys("status.status", data["status"])
        if event == "progress_state":
            for state in data["nodes"].values():
                _JOURNAL.add_keys("progress_state.nodes", state)
        told = f"{'all' if sid is None else 'ws'} {event} {_message(event, data)}".rstrip()
        _JOURNAL.add(told)
        send_sync(event, data, sid)
        _JOURNAL.hold_here(told)

    _SERVER.send_sync = watched


# prompts and nodes


def _on_prompt(body: dict[str, Any]) -> dict[str, Any]:
    _JOURNAL.add("on_prompt")
    return body


def _watch_validation() -> None:
    validate_prompt = execution.validate_prompt

    @functools.wraps(validate_prompt)
    async def watched(*args: Any, **kwargs: Any) -> Any:
        _JOURNAL.add("validate_start")
        answer = await validate_prompt(*args, **kwargs)
        _JOURNAL.add(f"validate_end {'ok' if answer[0] else 'refused'}")
        return answer

    execution.validate_prompt = watched


def _watch_execution() -> None:
    execute, reset = execution.PromptExecutor.execute, execution.PromptExecutor.reset
    get_output_data = execution.get_output_data

    @functools.wraps(execute)
    def watched_execute(self: Any, *args: Any, **kwargs: Any) -> None:
        _JOURNAL.add("execute_start")
        try:
            execute(self, *args, **kwargs)
        finally:
            _JOURNAL.add(f"execute_end {'success' if self.success else 'failure'}")

    @functools.wraps(reset)
    def watched_reset(self: Any) -> None:
        reset(self)
        _JOURNAL.add("reset_executor")

    @functools.wraps(get_output_data)
    async def watched_node(prompt_id: str, unique_id: str, obj: Any, *args: Any, **kwargs: Any) -> Any:
        class_type = next((name for name, cls in _NODES.NODE_CLASS_MAPPINGS.items() if cls is type(obj)), "?")
        _JOURNAL.add(f"node_start {unique_id} {class_type}")
        try:
            output = await get_output_data(prompt_id, unique_id, obj, *args, **kwargs)
        except BaseException as error:
            _JOURNAL.add(f"node_end {unique_id} raised {type(error).__name__}")
            raise
        _JOURNAL.add(f"node_end {unique_id}")
        return output

    execution.PromptExecutor.execute = watched_execute
    execution.PromptExecutor.reset = watched_reset
    execution.get_output_data = watched_node


# models and sampling


def _watch_models() -> None:
    load_models_gpu = comfy.model_management.load_models_gpu
    unload_all_models = comfy.model_management.unload_all_models

    @functools.wraps(load_models_gpu)
    def watched_load(models: Any, *args: Any, **kwargs: Any) -> Any:
        models = list(models)
        _JOURNAL.add(f"load {_here()} {','.join(type(patcher.model).__name__ for patcher in models) or '-'}")
        loaded = load_models_gpu(models, *args, **kwargs)
        _JOURNAL.add(f"loaded {_here()}")
        return loaded

    @functools.wraps(unload_all_models)
    def watched_unload() -> Any:
        _JOURNAL.add("unload_all")
        return unload_all_models()

    comfy.model_management.load_models_gpu = watched_load
    comfy.model_management.unload_all_models = watched_unload


def _told(what: str, executor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _JOURNAL.add(f"{what}_start {_here()}")
    try:
        result = executor(*args, **kwargs)
    except BaseException as error:
        _JOURNAL.add(f"{what}_end {_here()} raised {type(error).__name__}")
        raise
    _JOURNAL.add(f"{what}_end {_here()}")
    return result


def _outer_sample(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _told("sample", executor, args, kwargs)


def _predict_noise(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _JOURNAL.applied = 0
    try:
        predicted = executor(*args, **kwargs)
    except BaseException as error:
        _JOURNAL.add(f"step {_here()} applied {_JOURNAL.applied} raised {type(error).__name__}")
        raise
    _JOURNAL.add(f"step {_here()} applied {_JOURNAL.applied}")
    return predicted


def _apply_model(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _JOURNAL.applied += 1
    if _JOURNAL.fail_next_apply:
        _JOURNAL.fail_next_apply = False
        raise torch.OutOfMemoryError("out of memory, forced by the probe")
    return executor(*args, **kwargs)


def _watch_sampling() -> None:
    prepare_model_patcher = comfy.sampler_helpers.prepare_model_patcher
    kinds = comfy.patcher_extension.WrappersMP

    @functools.wraps(prepare_model_patcher)
    def watched(model: Any, conds: Any, model_options: dict[str, Any]) -> Any:
        prepared = prepare_model_patcher(model, conds, model_options)
        wrappers = model_options["transformer_options"].setdefault("wrappers", {})
        for kind, wrapper in (
            (kinds.OUTER_SAMPLE, _outer_sample),
            (kinds.PREDICT_NOISE, _predict_noise),
            (kinds.APPLY_MODEL, _apply_model),
        ):
            wrappers.setdefault(kind, {})["probe"] = [wrapper]
        return prepared

    comfy.sampler_helpers.prepare_model_patcher = watched


# routes


@_SERVER.routes.get("/probe/events")
async def _get_events(request: web.Request) -> web.Response:
    if "until" in request.query:
        await _JOURNAL.wait_for(request.query["until"])
    return web.json_response(_JOURNAL.snapshot())


def _command(path: str) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    def register(act: Callable[[dict[str, Any]], None]) -> None:
        async def handle(request: web.Request) -> web.Response:
            act(await request.json() if request.can_read_body else {})
            return web.json_response({})

        handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = handle
        _SERVER.routes.post(path)(handler)

    return register


@_command("/probe/reset")
def _reset(_body: dict[str, Any]) -> None:
    _JOURNAL.reset()


@_command("/probe/hold")
def _hold(body: dict[str, Any]) -> None:
    _JOURNAL.hold_at(body["at"])


@_command("/probe/release")
def _release(_body: dict[str, Any]) -> None:
    _JOURNAL.release()


@_command("/probe/oom")
def _oom(_body: dict[str, Any]) -> None:
    _JOURNAL.fail_next_apply = True


_SERVER.add_on_prompt_handler(_on_prompt)
_watch_messages()
_watch_validation()
_watch_execution()
_watch_models()
_watch_sampling()
