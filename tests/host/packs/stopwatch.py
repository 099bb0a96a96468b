"""A custom node for tests, in the stand-in as in a real ComfyUI: trivial nodes, and what each prompt costs the process.

A prompt is timed from the moment the worker takes it out of the queue to the moment it hands the result in, so that whatever
any pack puts around `PromptExecutor.execute` lies inside, in whichever order the packs were loaded. Its figures are told when
the worker waits for the next one: what it does in between, as collecting garbage, then runs into no other prompt.
"""

import asyncio
import os
import threading
import time

import execution
from aiohttp import web
from server import PromptServer

DONE = threading.Condition()
FIGURES = {}
MEASURED = {}
STARTED = []


def now():
    """Seconds: of the clock, of this thread on a core, of the whole process on all cores."""
    return time.perf_counter(), time.thread_time(), time.process_time()


def timed_get(original):
    def get(*args, **kwargs):
        with DONE:
            FIGURES.update(MEASURED)
            DONE.notify_all()
        item = original(*args, **kwargs)
        if item is not None:
            STARTED[:] = now()
        return item

    return get


def timed_done(original):
    def task_done(self, item_id, *args, **kwargs):
        spent = [after - before for before, after in zip(STARTED, now(), strict=True)]
        prompt_id = self.currently_running[item_id][1]
        MEASURED[prompt_id] = dict(zip(("wall", "worker", "process"), spent, strict=True))
        return original(self, item_id, *args, **kwargs)

    return task_done


execution.PromptQueue.get = timed_get(execution.PromptQueue.get)
execution.PromptQueue.task_done = timed_done(execution.PromptQueue.task_done)


WRAPPERS = {"get_output_data": execution, "execute": execution.PromptExecutor}
"""What the pack puts around every node and every prompt."""
KEPT = {}


def switch(on):
    """The pack's check of posted prompts and its wrappers, in place or not, while its modules stay. Two processes differ by
    some per cent whatever runs in them (where their memory lies, which core they are on); one does not."""
    os.environ["VRAM_HEADROOM_MODE"] = "warn" if on else "off"
    for name, owner in WRAPPERS.items():
        if on and name in KEPT:
            setattr(owner, name, KEPT.pop(name))
        elif not on and name not in KEPT:
            KEPT[name] = original = getattr(owner, name)
            while hasattr(original, "__vram_headroom_seam__"):
                original = original.__wrapped__
            setattr(owner, name, original)


@PromptServer.instance.routes.post("/stopwatch/pack")
async def switch_pack(request):
    switch((await request.json())["on"])
    return web.json_response({})


@PromptServer.instance.routes.get("/stopwatch/{prompt_id}")
async def figures(request):
    """Waits for the prompt's end, then says what it cost."""

    def wait():
        with DONE:
            DONE.wait_for(lambda: request.match_info["prompt_id"] in FIGURES, 60)
            return FIGURES.get(request.match_info["prompt_id"])

    return web.json_response(await asyncio.get_running_loop().run_in_executor(None, wait))


class Step:
    """Adds one: there is no node that does less."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": ("INT", {"default": 0, "min": 0, "max": 2**40})}}

    def run(self, value):
        return (value + 1,)


class End:
    """The end of a row of steps."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = "tests"
    INPUT_TYPES = Step.INPUT_TYPES

    def show(self, value):
        return {"ui": {"value": [value]}}


NODE_CLASS_MAPPINGS = {"StopwatchStep": Step, "StopwatchEnd": End}
