"""A custom node pack for tests: writes down what each load put where, in a real ComfyUI with a simulated card.

POST /residency/next {...} says on which card and under which rules the next prompt runs, models and caches thrown away before
it where `fresh` is true; GET /residency/seen answers what its loads did, once per prompt.

The lab's simulated card counts what the list of loaded models says. With `from_list` false it counts what is on the device, as
a driver does: a model that is taken off the list while it is loaded again is still there.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from typing import Any

import comfy.model_management as management
import execution
import torch
from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

_DEVICE = torch.device("cpu", 0)

_ARGUMENTS = ("memory_required", "force_patch_weights", "minimum_memory_required", "force_full_load")

_next: dict[str, Any] = {}
_loads: list[dict[str, Any]] = []
_models: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_stays: weakref.WeakSet[Any] = weakref.WeakSet()
_patches: dict[Any, int] = {}

# the stand-in, which type checkers read, has no such function
_module_size = getattr(management, "module_size", None) or (lambda model: 0)
_count = 0


@functools.cache
def _card() -> tuple[Any, Any]:
    """The pack that simulates the card, and how it counts by itself; looked for late, as packs load in any order."""
    state = getattr(management, "FAKE_GPU", None)
    card = next(module for module in list(sys.modules.values()) if state is not None and getattr(module, "S", None) is state)
    return card, card.used


def _driver_used() -> int:
    """Bytes on the card whoever lists them; what has nowhere to go stays there once it came."""
    return sum(
        _module_size(model) if model in _stays else model.model_loaded_weight_memory
        for model in list(_models)
        if model in _stays or model.device == _DEVICE
    )


def _number(patcher: Any) -> int:
    global _count
    model = patcher.model
    if model not in _models:
        _models[model] = _count
        _count += 1
    if patcher.offload_device == _DEVICE:
        _stays.add(model)
    return _models[model]


def _modules(patcher: Any) -> list[list[Any]]:
    """Modules as the host sorts them for loading: [bytes with what casting takes, bytes, whether it can be cast]."""
    listed = sorted(patcher._load_list(), reverse=True, key=lambda entry: entry[:3])
    return [[entry[0], entry[1], int(hasattr(entry[3], "comfy_cast_weights"))] for entry in listed]


def _parameters(patcher: Any) -> list[list[Any]]:
    """Tensors as stored: [name, bytes, elements, bytes of one in the dtype it is computed in if that is another, castable]."""
    told: list[list[Any]] = []
    compute = getattr(patcher.model, "manual_cast_dtype", None)
    for path, module in patcher.model.named_modules():
        castable = hasattr(module, "comfy_cast_weights")
        for name, tensor in module.named_parameters(recurse=False):
            other = compute.itemsize if compute is not None and compute != tensor.dtype else 0
            told.append([f"{path}.{name}", tensor.nbytes, tensor.numel(), other, int(castable)])
    return told


def _watch_loads() -> None:
    load = management.load_models_gpu

    @functools.wraps(load)
    def watched(models: Any, *args: Any, **kwargs: Any) -> Any:
        numbers = [_number(patcher) for patcher in models]
        answer = load(models, *args, **kwargs)
        given = dict(zip(_ARGUMENTS, args, strict=False))
        given |= kwargs
        context = get_executing_context()
        _loads.append(
            {
                "node": None if context is None else str(context.node_id),
                "models": numbers,
                "patches": [_patches.setdefault(patcher.patches_uuid, len(_patches)) for patcher in models],
                "patched_names": [sorted(patcher.patches) for patcher in models],
                "parameters": [_parameters(patcher) for patcher in models],
                "modules": [_modules(patcher) for patcher in models],
                "size": [patcher.model_size() for patcher in models],
                "class": [type(patcher.model).__name__ for patcher in models],
                "required": given.get("memory_required", 0),
                "minimum": given.get("minimum_memory_required"),
                "full": bool(given.get("force_full_load", False)),
                "loaded": {number: model.model_loaded_weight_memory for model, number in _models.items()},
                "buffer": {number: model.model_offload_buffer_memory for model, number in _models.items()},
                "listed": [_models[m.model.model] for m in management.current_loaded_models if m.model is not None],
                "free": management.get_free_memory(_DEVICE),
            }
        )
        return answer

    management.load_models_gpu = watched


def _watch_prompts() -> None:
    execute = execution.PromptExecutor.execute

    @functools.wraps(execute)
    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = dict(_next)
        if settings.get("fresh"):
            management.unload_all_models()
            self.reset()
            gc.collect()
            _models.clear()
        _apply(settings)
        _loads.clear()
        return execute(self, *args, **kwargs)

    execution.PromptExecutor.execute = prepared


def _apply(settings: dict[str, Any]) -> None:
    card, list_used = _card()
    card.S["total"] = settings["total"]
    card.used = list_used if settings["from_list"] else _driver_used
    management.vram_state = management.VRAMState[settings["vram_state"]]
    management.DISABLE_SMART_MEMORY = not settings["smart_memory"]
    management.NUM_STREAMS = settings["streams"]
    management.MIN_WEIGHT_MEMORY_RATIO = settings["ratio"]
    management.EXTRA_RESERVED_VRAM = settings["reserve"]
    management.minimum_inference_memory = lambda: settings["minimum_inference"]


@PromptServer.instance.routes.post("/residency/next")
async def _set_next(request: web.Request) -> web.Response:
    _next.clear()
    _next.update(await request.json())
    return web.json_response({})


@PromptServer.instance.routes.get("/residency/seen")
async def _seen(request: web.Request) -> web.Response:
    return web.json_response({"loads": _loads})


_watch_loads()
_watch_prompts()
