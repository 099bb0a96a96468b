"""A test's custom node: runs out of memory in a real ComfyUI where it is asked to, inside of forwards, and counts what ran.

POST /injected {"faults": [{"where": ..., "number": n, "times": k, "after": false}]}, GET /injected, GET /injected/process
"""

import gc
import importlib
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import torch
from aiohttp import web

# Not import statements: of this project only nodes/host and the stand-in may hold on to ComfyUI's names.
wan_model: Any = importlib.import_module("comfy.ldm.wan.model")
wan_vae: Any = importlib.import_module("comfy.ldm.wan.vae")
management: Any = importlib.import_module("comfy.model_management")
sd: Any = importlib.import_module("comfy.sd")
server: Any = importlib.import_module("server").PromptServer.instance

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
FAULTS: list[dict[str, Any]] = []
DONE: Counter[str] = Counter()
RAISED = [0]
TILES = threading.local()


def due(where: str, after: bool) -> None:
    for fault in FAULTS:
        if (fault["where"], fault.get("after", False)) == (where, after) and fault["number"] == DONE[where] and fault["times"]:
            fault["times"] -= 1
            RAISED[0] += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory (injected, {where} {DONE[where]})")


def watch(owner: object, name: str, where_of: Callable[[], str]) -> None:
    inner = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        # the pack's self-check runs forwards on the meta device
        if len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].is_meta:
            return inner(*args, **kwargs)
        where = where_of()
        due(where, False)
        out = inner(*args, **kwargs)
        due(where, True)
        DONE[where] += 1
        return out

    setattr(owner, name, watched)


def in_tiles(owner: object, name: str) -> None:
    inner = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        TILES.on = True
        try:
            return inner(*args, **kwargs)
        finally:
            TILES.on = False

    setattr(owner, name, marked)


watch(wan_model.WanSelfAttention, "forward", lambda: "attention")
watch(wan_vae.WanVAE, "decode", lambda: "decode tile" if getattr(TILES, "on", False) else "decode")
watch(sd.CLIP, "load_model", lambda: "text encoder")
in_tiles(sd.VAE, "decode_tiled_3d")
routes = server.routes


@routes.post("/injected")
async def inject(request: web.Request) -> web.Response:
    FAULTS[:] = (await request.json())["faults"]
    DONE.clear()
    RAISED[0] = 0
    return web.json_response({})


@routes.get("/injected")
async def counted(request: web.Request) -> web.Response:
    return web.json_response({**DONE, "raised": RAISED[0]})


@routes.post("/injected/forget")
async def forget(request: web.Request) -> web.Response:
    """Nothing cached and nothing loaded when the next prompt starts."""
    server.prompt_queue.set_flag("unload_models", True)
    server.prompt_queue.set_flag("free_memory", True)
    return web.json_response({})


@routes.get("/injected/process")
async def process(request: web.Request) -> web.Response:
    gc.collect()
    here = psutil.Process(os.getpid())
    return web.json_response(
        {
            "rss": here.memory_info().rss,
            "threads": here.num_threads(),
            "files": here.num_fds(),
            "models": len(management.current_loaded_models),
        }
    )
