"""Runs inside the stand-in: the pack with one seam switched off or absent, each in a fork of its own, and what was lost.

Absent: what the seam holds on to is hidden while the pack is imported, or for good where ComfyUI itself never asks for it.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import json
import logging
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

from aiohttp.test_utils import make_mocked_request
from host.lab import Prompt, node, text_to_video, with_inputs
from loadpack import CANONICAL_NAME, ROOT, load_pack
from prompts import with_our_loaders

OURS = "VRAMHeadroom"
SECONDS = 30.0
AT_ONCE = 3
OTHER = ROOT / "tests" / "host" / "packs" / "second_wrapper.py"
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
        from server import PromptServer
        from standin import dynamic as dynamic_vram
        from standin import settings
        from standin.journal import journal

        settings.configure(replace(settings.current(), dynamic=dynamic))
        if dynamic:
            dynamic_vram.enable_if_wanted()
        self.log = Lines()
        logging.getLogger().addHandler(self.log)
        logging.getLogger().setLevel(logging.INFO)
        self.server = PromptServer(asyncio.new_event_loop())
        self.queue = self.server.prompt_queue
        self.journal = journal
        self.execution, self.nodes = execution, nodes
        nodes.init_builtin_nodes()
        self.bare = len(list(self.server.routes)), len(self.server.app.middlewares)

    def import_pack(self) -> None:
        offer = load_pack()
        self.nodes.NODE_CLASS_MAPPINGS.update(offer.NODE_CLASS_MAPPINGS)
        from vram_headroom.nodes import controls

        self.pack = controls.Control.pack
        self.lifecycle = controls.Control.lifecycle

    def import_other(self) -> Counter[str]:
        """The other pack; returns what it counts."""
        assert self.nodes.load_custom_node(str(OTHER))
        return sys.modules[str(OTHER.with_suffix(""))].CALLS

    def vae_and_latent(self) -> tuple[Any, Any]:
        import torch

        loader = self.nodes.NODE_CLASS_MAPPINGS["VAELoader"]
        vae = getattr(loader(), loader.FUNCTION)(vae_name=text_to_video()["3"]["inputs"]["vae_name"])[0]
        return vae, {"samples": torch.zeros(1, 16, 2, 8, 8)}

    def watch_steps(self, look: Callable[[], None]) -> None:
        """Call `look` on the worker thread, between the steps of a sampler."""
        import comfy.utils

        update = comfy.utils.ProgressBar.update_absolute

        def looking(*args: Any, **kwargs: Any) -> None:
            look()
            update(*args, **kwargs)

        comfy.utils.ProgressBar.update_absolute = looking

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


def observe(lab: Lab, seam: str) -> dict[str, Any]:
    """What the pack still does while prompts run, in the words of the seams' rows."""

    pack, host = lab.pack, lab.pack.host
    lab.put("waits", scenario())
    queued = len(host.server.queued())
    lab.queue.wipe_queue()
    host.server.setting(make_mocked_request("GET", "/"), "x")
    looks: list[tuple[bool, bool]] = []

    def look() -> None:
        running = host.execution.running
        looks.append((running is not None and running.node_id is not None, any(m.in_use for m in host.models.loaded())))

    lab.watch_steps(look)
    lab.start_worker()
    status = lab.run("scenario", scenario())
    idle = host.worker.submit(lambda: True)
    lab.settle()
    seen = {
        "status": status,
        "traceback": [line for line in lab.log.said if "Traceback" in line],
        "seams": {found.name: found.state for found in host.seams.report()},
        "prompts that wait": queued,
        "text encoder left before sampling": any(move.reason == "between uses" for move in pack.offloader.history()),
        "running node shown": any(shown for shown, _ in looks),
        "in use while it runs": any(used for _, used in looks),
        "peaks": len(lab.lifecycle.peaks.of("scenario")) > 0,
        "done when idle": idle.done(),
        "leaves once the queue is empty": host.worker.tells_when_idle,
        "loaded models seen": len(host.models.loaded()) > 0,
        "pinned stays": pinned_stays(lab),
        "cards": len(host.models.accelerators()),
        "routes": len(list(lab.server.routes)) - lab.bare[0],
        "middlewares": len(lab.server.app.middlewares) - lab.bare[1],
        "handlers": len(lab.server.on_prompt_handlers),
        "total of pages": host.models.pages.used_by_process() is not None,
        "tiles noticed": tiles_noticed(lab),
        "told over the websocket": host.server.send("vram_headroom.status", {}, "nobody"),
    }
    seen |= rescued(lab)
    if seam in ("nodes that expand", ""):
        seen["pipeline"] = lab.run("pipeline", pipeline_scenario())
    if seam in ("file of a loaded model", ""):
        lab.run("stock", text_to_video())
        seen["files of stock loaders"] = sum(model.file is not None for model in host.models.loaded())
    return seen


def rescued(lab: Lab) -> dict[str, bool]:
    """What goes on after memory ran out once, with something else on the card that can leave."""
    from standin.faults import Fault, faults

    stock = text_to_video()
    faults.ask(Fault("attention", 1))
    step = lab.run("step", with_inputs(stock, "8", seed=21))
    faults.ask(Fault("decode", 0))
    decoded = lab.run("decode", with_inputs(stock, "8", seed=22))
    whole = not faults.count("decode tile")
    faults.ask(Fault("text encoder", 0))
    text = lab.run("text", with_inputs(stock, "4", text="another"))
    faults.ask()
    return {
        "step is tried again": step == "success",
        "decode is done whole again": decoded == "success" and whole,
        "text is encoded again": text == "success",
    }


def pinned_stays(lab: Lab) -> bool:
    """Whether what is pinned is still there after ComfyUI wanted all the memory there is."""
    import comfy.model_management as model_management

    model_management.free_memory(1 << 50, model_management.get_torch_device())
    entries = [entry for entry in model_management.current_loaded_models if entry.model is not None]
    return bool({id(entry.model.model) for entry in entries} & set(lab.pack.offloader.pinned_keys()))


def tiles_noticed(lab: Lab) -> bool:
    """Whether the pack's decoder says that ComfyUI decoded in tiles, where it did."""
    decoder = lab.pack.host.decoder

    class TileOnly:
        """A VAE decode that turns to tiles, as ComfyUI's does when memory runs out."""

        FUNCTION = "decode"

        def decode(self, vae: Any, samples: Any) -> tuple[Any]:
            return (vae.decode_tiled_3d(samples["samples"]),)

    real = lab.nodes.NODE_CLASS_MAPPINGS["VAEDecode"]
    lab.nodes.NODE_CLASS_MAPPINGS["VAEDecode"] = TileOnly
    try:
        return decoder.whole(*lab.vae_and_latent())[1] is not None
    finally:
        lab.nodes.NODE_CLASS_MAPPINGS["VAEDecode"] = real


def with_another_pack(order: str) -> dict[str, Any]:
    """What both packs saw of one prompt. `order`: the other one is loaded `before` or `after` ours."""
    from standin.journal import journal

    lab = Lab()
    if order == "before":
        calls = lab.import_other()
        lab.import_pack()
    else:
        lab.import_pack()
        calls = lab.import_other()
    ours: Counter[str] = Counter()
    host = lab.pack.host

    class Watch:
        def prompt_started(self, span: Any) -> None:
            ours["execute"] += 1

        def prompt_ended(self, span: Any) -> None: ...

        def node_started(self, span: Any) -> None:
            ours["get_output_data"] += 1

        def node_ended(self, span: Any, error: Any) -> None: ...

    def pinned() -> Any:
        ours["free_memory"] += 1
        return lab.pack.offloader.pinned_keys()

    host.execution.watch(Watch())
    host.execution.watch_nodes(Watch())
    host.execution.every_node("counting")
    host.placement.before_load(lambda keys: ours.update(("load_models_gpu",)))
    host.placement.keep_loaded(pinned)
    host.worker.at_idle(lambda: ours.update(("get_flags",)))
    lab.start_worker()
    status = lab.run("scenario", scenario())
    stays, noticed = pinned_stays(lab), tiles_noticed(lab)
    return {
        "status": status,
        "traceback": [line for line in lab.log.said if "Traceback" in line],
        "ours": ours | Counter(decode_tiled_3d=int(noticed)),
        "theirs": calls,
        "nodes run": sum(entry.what == "node_start" for entry in journal.since()),
        "pinned stays": stays,
        "text encoder left before sampling": any(move.reason == "between uses" for move in lab.pack.offloader.history()),
        "seams": {found.name: found.state for found in host.seams.report()},
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


@contextmanager
def without_source_files() -> Iterator[None]:
    """Patchers whose loaders left no note, as far as the pack can see; ComfyUI itself copies the note."""
    from comfy.model_patcher import ModelPatcher

    def read(patcher: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith(CANONICAL_NAME):
            raise AttributeError("cached_patcher_init")
        return vars(patcher)["cached_patcher_init"]

    def write(patcher: Any, note: Any) -> None:
        vars(patcher)["cached_patcher_init"] = note

    setattr(ModelPatcher, "cached_patcher_init", property(read, write))  # noqa: B010 - no such attribute is declared
    yield


def hiding(lab: Lab, seam: str) -> Any:
    """Hides what a seam holds on to; nothing where it can't be absent without ComfyUI being no ComfyUI."""
    import comfy.model_management as model_management
    import comfy.sampler_helpers
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
        "start of a sampling": lambda: hidden(comfy.sampler_helpers, "prepare_model_patcher"),
        "tiled VAE decode": lambda: hidden(comfy.sd.VAE, "decode_tiled_3d"),
        "tiled VAE encode": lambda: hidden(comfy.sd.VAE, "encode_tiled_3d"),
        "decode and encode of VAEs": lambda: hidden(comfy.sd.VAE, "encode_tiled"),
        "text and vision encoders": lambda: hidden(comfy.sd.CLIP, "encode_from_tokens"),
        "nodes that expand": lambda: hidden(graph_utils, "GraphBuilder"),
        "list of loaded models": lambda: hidden(model_management, "current_loaded_models"),
        "ComfyUI's memory reading": lambda: hidden(model_management, "get_free_memory"),
        "file of a loaded model": without_source_files,
        "results of the last run": lambda: hidden(executor, "execute"),
        "prompts that wait": lambda: hidden(queue, "get_current_queue_volatile", for_good=True),
        "user settings": lambda: hidden(lab.server, "user_manager", for_good=True),
        "prompt handler": lambda: hidden(type(lab.server), "add_on_prompt_handler"),
        "check before queueing": lambda: hidden(lab.server, "app"),
        PAGES: lambda: hidden(importlib.import_module("comfy_aimdo.control"), "get_total_vram_usage", for_good=True),
        "routes": lambda: hidden(lab.server, "routes"),
        "websocket events": lambda: hidden(type(lab.server), "send_sync"),
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
    return observe(lab, seam)


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
    """One answer for each (seam, how); (order, "other") is with another pack. What is imported here is there in every fork."""
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
    works = [
        functools.partial(with_another_pack, name) if how == "other" else functools.partial(without, name, how)
        for name, how in cases
    ]
    answers: list[dict[str, Any]] = []
    for first in range(0, len(works), AT_ONCE):
        answers += [read() for read in [fork(work) for work in works[first : first + AT_ONCE]]]
    return answers
