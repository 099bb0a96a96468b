"""Runs inside the stand-in: the pack with one seam switched off or absent, each in a fork of its own, and what was lost.

Absent: what the seam holds on to is hidden while the pack is imported, or for good where ComfyUI itself never asks for it.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

from host.lab import Prompt, node, text_to_video, with_inputs
from loadpack import CANONICAL_NAME, ROOT, load_pack
from prompts import with_our_loaders

OURS = "VRAMHeadroom"
SECONDS = 30.0
AT_ONCE = 3
PAGES = "pages of DynamicVRAM"


def scenario() -> Prompt:
    """A text encoder that leaves before sampling, a pinned VAE, and a decode that says on its node what it did."""
    prompt = with_our_loaders(text_to_video())
    prompt["20"] = node(f"{OURS}ComponentPolicy", policy="leaves between uses", priority=1, clip=["2", 0])
    prompt["21"] = node(f"{OURS}ComponentPolicy", policy="pinned to the card", priority=1, vae=["3", 0])
    prompt["9"] = node(f"{OURS}VAEDecode", samples=["8", 0], vae=["21", 2])
    return with_inputs(with_inputs(prompt, "4", clip=["20", 1]), "5", clip=["20", 1])


def pipeline_scenario() -> Prompt:
    """One node that expands into the loaders."""
    prompt = text_to_video()
    models = {"high_noise_model": prompt["1"]["inputs"]["unet_name"], "low_noise_model": "none", "clip_vision": "none"}
    files = {"text_encoder": prompt["2"]["inputs"]["clip_name"], "vae": prompt["3"]["inputs"]["vae_name"]}
    more = {"weight_dtype": "default", "pipeline": "wan", "text_encoder_device": "default"}
    prompt["20"] = node(f"{OURS}LoadPipeline", **models, **files, **more)
    for loader in "123":
        del prompt[loader]
    prompt = with_inputs(with_inputs(prompt, "4", clip=["20", 2]), "5", clip=["20", 2])
    return with_inputs(with_inputs(prompt, "7", model=["20", 0]), "9", vae=["20", 3])


class Lines(logging.Handler):
    """Everything that was logged, with its traceback if it has one."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


class Lab:
    """A stand-in with its worker, and the pack in it, in this process."""

    def __init__(self, dynamic: bool = False) -> None:
        import execution
        import nodes
        from standin import dynamic as dynamic_vram
        from standin import settings
        from server import PromptServer

        settings.configure(replace(settings.current(), dynamic=dynamic))
        if dynamic:
            dynamic_vram.enable_if_wanted()
        self.log = Lines()
        logging.getLogger().addHandler(self.log)
        logging.getLogger().setLevel(logging.INFO)
        self.server = PromptServer(asyncio.new_event_loop())
        self.queue = self.server.prompt_queue
        self.execution, self.nodes = execution, nodes
        nodes.init_builtin_nodes()
        self.bare = len(list(self.server.routes)), len(self.server.app.middlewares)

    def import_pack(self) -> None:
        offer = load_pack()
        self.nodes.NODE_CLASS_MAPPINGS.update(offer.NODE_CLASS_MAPPINGS)
        from vram_headroom.nodes import controls

        self.pack = controls.Control.pack
        self.lifecycle = controls.Control.lifecycle

    def watch_forwards(self, look: Callable[..., None]) -> None:
        """Call `look` on the worker thread, after a sampler's first step."""
        import comfy.utils

        bar, update = comfy.utils.ProgressBar, comfy.utils.ProgressBar.update_absolute
        setattr(bar, "update_absolute", lambda *args, **kwargs: (look(), update(*args, **kwargs))[1])  # noqa: B010

    def start_worker(self) -> None:
        from standin import worker

        worker.hook_progress(self.server)
        threading.Thread(target=worker.work, args=(self.queue, self.server), daemon=True).start()
        self.settle()

    def settle(self) -> None:
        if not self.queue.wait_until_idle(SECONDS):
            raise TimeoutError("the worker never became idle")

    def put(self, prompt_id: str, prompt: Prompt) -> None:
        valid, error, outputs, per_node = asyncio.run(self.execution.validate_prompt(prompt_id, prompt, None))
        if not valid:
            raise AssertionError(f"refused: {error} {per_node}")
        self.queue.put((self.server.number, prompt_id, prompt, {}, outputs, {}))
        self.server.number += 1

    def run(self, prompt_id: str, prompt: Prompt) -> str:
        self.put(prompt_id, prompt)
        self.settle()
        return self.queue.get_history(prompt_id)[prompt_id]["status"]["status_str"]


def observe(lab: Lab) -> dict[str, Any]:
    """What the pack still does, in the words of the seams' rows."""
    import comfy.model_management as model_management
    from standin.journal import journal

    pack, host = lab.pack, lab.pack.host
    waiting = "waits", scenario()
    lab.put(*waiting)
    queued = len(host.server.queued())
    lab.queue.wipe_queue()
    seen: list[tuple[bool, bool]] = []

    def look(*_: Any) -> None:
        running = host.execution.running
        seen.append((running is not None and running.node_id is not None, any(m.in_use for m in host.models.loaded())))

    lab.watch_forwards(look)
    lab.start_worker()
    status = lab.run("scenario", scenario())
    moves = [(record.component, record.reason) for record in pack.offloader.history()]
    kept = host.node_cache.kept()
    idle = host.worker.submit(lambda: threading.current_thread() is threading.main_thread())
    lab.settle()
    done_when_idle = idle.done()
    pipelines = lab.run("pipeline", pipeline_scenario())
    stock = lab.run("stock", with_inputs(text_to_video(), "8", seed=2))
    files = sorted(model.file for model in host.models.loaded() if model.file)
    loaded = len(host.models.loaded())
    card = model_management.get_torch_device()
    lab.run("scenario again", with_inputs(scenario(), "8", seed=3))
    model_management.free_memory(1 << 50, card)
    left = [id(entry.model.model) for entry in model_management.current_loaded_models if entry.model is not None]
    host.server.setting(SimpleNamespace(headers={}), "x")
    seams = {seam.name: seam.state for seam in host.seams.report()}
    return {
        "status": [status, pipelines, stock],
        "seams": seams,
        "named": {seam.name: seam.without_it for seam in host.seams.report() if seam.state != "live"},
        "log": [line for line in lab.log.said if "Traceback" in line],
        "said": lab.log.said,
        "queued": queued,
        "text encoder left before sampling": any(reason == "between uses" for _, reason in moves),
        "running node shown": any(shown for shown, _ in seen),
        "in use while it runs": any(used for _, used in seen),
        "peaks": len(lab.lifecycle.peaks.of("scenario")),
        "results kept": kept is not None,
        "done when idle": done_when_idle,
        "told when idle": host.worker.tells_when_idle,
        "files of stock loaders": len(files),
        "loaded": loaded,
        "pinned stays": bool(set(left) & set(pack.offloader.pinned_keys())),
        "text on nodes": sum(entry.what == "text" for entry in journal.since()),
        "cards": len(host.models.accelerators()),
        "routes": len(list(lab.server.routes)) - lab.bare[0],
        "middlewares": len(lab.server.app.middlewares) - lab.bare[1],
        "handlers": len(lab.server.on_prompt_handlers),
    }


@contextmanager
def hidden(owner: Any, name: str, for_good: bool = False) -> Iterator[None]:
    """`owner` without the attribute, its base classes too."""
    there = getattr(owner, name)
    own = name in vars(owner)
    delattr(owner, name) if own else setattr(owner, name, None)
    yield
    if not for_good:
        setattr(owner, name, there)


def hiding(lab: Lab, seam: str) -> Any:
    """Hides what a seam holds on to; nothing where it can't be absent without ComfyUI being no ComfyUI."""
    import comfy.model_management as model_management
    import comfy.sd
    import comfy_execution.graph_utils as graph_utils

    executor, queue = lab.execution.PromptExecutor, lab.execution.PromptQueue
    places: dict[str, Callable[[], Any]] = {
        "prompt start and end": lambda: hidden(executor, "execute"),
        "node start and end": lambda: hidden(lab.execution, "get_output_data"),
        "loading of models": lambda: hidden(model_management, "load_models_gpu"),
        "choice of who leaves the card": lambda: hidden(model_management, "free_memory"),
        "idle queue": lambda: hidden(queue, "get_flags"),
        "length of the queue": lambda: hidden(queue, "get_tasks_remaining"),
        "text on a node": lambda: hidden(type(lab.server), "send_progress_text", for_good=True),
        "tiled VAE decode": lambda: hidden(comfy.sd.VAE, "decode_tiled_3d"),
        "nodes that expand": lambda: hidden(graph_utils, "GraphBuilder"),
        "list of loaded models": lambda: hidden(model_management, "current_loaded_models"),
        "ComfyUI's memory reading": lambda: hidden(model_management, "get_free_memory"),
        "results of the last run": lambda: hidden(executor, "execute"),
        "prompts that wait": lambda: hidden(queue, "get_current_queue_volatile", for_good=True),
        "user settings": lambda: hidden(lab.server, "user_manager", for_good=True),
        "prompt handler": lambda: hidden(type(lab.server), "add_on_prompt_handler"),
        "check before queueing": lambda: hidden(lab.server, "app"),
        PAGES: lambda: hidden(importlib.import_module("comfy_aimdo.control"), "get_total_vram_usage", for_good=True),
        "routes": lambda: hidden(lab.server, "routes"),
    }
    return places[seam]()


def without(seam: str, how: str) -> dict[str, Any]:
    """`how`: off, absent, or none of both."""
    lab = Lab(dynamic=seam == PAGES)
    if how == "off":
        os.environ["VRAM_HEADROOM_SEAMS_OFF"] = f"nothing of that name, {seam}"
    if how == "absent":
        with hiding(lab, seam):
            lab.import_pack()
    else:
        lab.import_pack()
    return observe(lab)


def fork(work: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Begins `work` in a process of its own; what is returned waits for its answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            text = json.dumps(work())
        except BaseException:
            text = json.dumps({"failed": traceback.format_exc()})
        with os.fdopen(writing, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(writing)

    def answer() -> dict[str, Any]:
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return json.loads(text)

    return answer


def every(cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One answer for each (seam, how). What is imported here is there in every fork."""
    import comfy.sd  # noqa: F401
    import server  # noqa: F401

    # the engine, which takes long to import and knows nothing of ComfyUI; the pack itself is imported in each fork
    root = ModuleType(CANONICAL_NAME)
    root.__path__ = [str(ROOT)]
    sys.modules[CANONICAL_NAME] = root
    for name in ("offloader", "status", "plan.advice", "plan.report", "selfcheck", "sampler"):
        importlib.import_module(f"{CANONICAL_NAME}.vram.{name}")
    del sys.modules[CANONICAL_NAME]
    # what is there already is nobody's garbage: the worker collects after each prompt, and would copy every page of it
    gc.collect()
    gc.freeze()
    started = [(lambda case=case: without(*case)) for case in cases]
    answers: list[dict[str, Any]] = []
    for first in range(0, len(started), AT_ONCE):
        answers += [read() for read in [fork(work) for work in started[first : first + AT_ONCE]]]
    return answers
