"""The table of seams: every place where the pack holds on to ComfyUI, probed, installed once, and reported."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ...vram.status import SeamReport

logger = logging.getLogger("vram_headroom")

MARK = "__vram_headroom_seam__"
"""Set on our wrappers, so that a module loaded twice does not wrap twice."""


State = Literal["live", "absent", "off"]


class Seam(NamedTuple):
    """One place. `kind` is official for documented extension points, private for what a release may move."""

    name: str
    kind: Literal["official", "private"]
    since: str
    """The oldest ComfyUI we saw it in."""
    without_it: str
    """What is lost where it is absent."""


ROUTES = Seam("routes", "official", "0.8", "no panel, no check: nothing can be asked from the browser or a script")
MIDDLEWARE = Seam("check before queueing", "official", "0.8", "prompts are queued without a plan; the check route still works")
PROMPT_HANDLER = Seam("prompt handler", "official", "0.8", "the verdict is not attached to queued prompts")
PROMPT_SPAN = Seam("prompt start and end", "private", "0.8", "loaded models count as idle while a prompt runs, no policy acts")
NODE_SPAN = Seam(
    "node start and end",
    "private",
    "0.8",
    "the running node is not shown, elastic models are not read, no peaks, and a text encoder stays until its prompt has ended",
)
EVENTS = Seam("websocket events", "official", "0.8", "the browser asks every few seconds instead of being told")
MODEL_LOADS = Seam("loading of models", "private", "0.8", "a text encoder stays until its prompt has ended")
PINS = Seam("choice of who leaves the card", "private", "0.8", "a pinned model stays only as long as ComfyUI needs no room")
IDLE_QUEUE = Seam("idle queue", "private", "0.8", "what the panel asks for waits until the next node has run")
QUEUE_WAIT = Seam("waiting queue", "private", "0.8", "what is asked for just as a prompt ends may wait until the next one")
QUEUE_LENGTH = Seam("length of the queue", "private", "0.8", "models leave after each prompt, though another one waits")
SAMPLING = Seam(
    "start of a sampling", "private", "0.8", "an out-of-memory error in a step ends the prompt, and what was sampled is lost"
)
TILED_DECODE = Seam("tiled VAE decode", "private", "0.8", "that ComfyUI fell back to tiles is not shown")
TILED_ENCODE = Seam("tiled VAE encode", "private", "0.8", "when memory runs out in a VAE, ComfyUI turns to tiles at once")
VAE_CALLS = Seam(
    "decode and encode of VAEs",
    "private",
    "0.8",
    "when memory runs out in a VAE, ComfyUI turns to tiles at once, and a latent that can't be decoded is lost",
)
ENCODERS = Seam("text and vision encoders", "private", "0.8", "an out-of-memory error in an encoder ends the prompt")
SUBGRAPHS = Seam("nodes that expand", "private", "0.8", "Load WAN Pipeline can't run; the single loaders can")
PAGES = Seam(
    "pages of DynamicVRAM", "private", "0.16", "elastic models can't be kept on the card, and count as another program's"
)
LOADED_MODELS = Seam(
    "list of loaded models",
    "private",
    "0.8",
    "what is loaded already counts as other programs' memory, and no model is sent away",
)
MEMORY_READING = Seam("ComfyUI's memory reading", "private", "0.8", "cards that only ComfyUI can read show no numbers")
SOURCE_FILES = Seam(
    "file of a loaded model", "private", "0.16", "models of stock loaders are not matched with the graph's files"
)


NODE_CACHE = Seam("results of the last run", "private", "0.8", "nodes that will not run again are counted as if they did")
QUEUE = Seam("prompts that wait", "private", "0.8", "a plan starts from what is loaded now, not from what queued prompts leave")

USER_SETTINGS = Seam("user settings", "private", "0.8", "what to do with a prompt that does not fit is always `warn`")


OFF_VARIABLE = "VRAM_HEADROOM_SEAMS_OFF"
"""Environment variable: names of seams not to use, separated by commas. For finding out what breaks what."""


@dataclass(slots=True)
class SeamTable:
    """What became of each seam. Filled while the pack connects, read by the status route."""

    off: frozenset[str] = frozenset()
    _states: dict[str, tuple[Seam, State]] = field(default_factory=dict)

    def knows(self, seam: Seam) -> bool:
        return seam.name in self._states

    def live(self, seam: Seam) -> bool:
        return seam.name in self._states and self._states[seam.name][1] == "live"

    def note(self, seam: Seam, live: bool) -> bool:
        """Record whether `seam` serves; says so in the log where it does not. Returns whether it may be used."""
        state: State = "off" if seam.name in self.off else "live" if live else "absent"
        self._states[seam.name] = (seam, state)
        if state == "absent":
            logger.info("this ComfyUI has no %s: %s", seam.name, seam.without_it)
        elif state == "off":
            logger.info("%s is switched off: %s", seam.name, seam.without_it)
        return state == "live"

    def wrap(self, seam: Seam, owner: object, name: str, around: Callable[..., Any]) -> bool:
        """Put `around(original, *args, **kwargs)` before whatever `owner.name` is now, ours or another pack's.

        Coroutine functions stay coroutine functions. Installing twice leaves one wrapper.
        """

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                return await around(original, *args, **kwargs)

            def called(*args: Any, **kwargs: Any) -> Any:
                return around(original, *args, **kwargs)

            return awaited if inspect.iscoroutinefunction(original) else called

        return self.replace(seam, owner, name, make)

    def replace(self, seam: Seam, owner: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """As `wrap`, with the wrapper that `make` returns for what is there: one call less where nodes pay for each."""
        original = getattr(owner, name, None)
        if not self.note(seam, live=callable(original)) or original is None:
            return False
        if getattr(original, MARK, None) == seam.name:
            return True
        wrapper = functools.wraps(original)(make(original))
        setattr(wrapper, MARK, seam.name)
        setattr(owner, name, wrapper)
        return True

    def wrap_all(self, seam: Seam, places: Sequence[tuple[object, str, Callable[..., Any]]]) -> bool:
        """As `wrap`, of a seam that is several places (owner, name, around): live where all of them are, else untouched."""
        if not self.note(seam, live=all(callable(getattr(owner, name, None)) for owner, name, _ in places)):
            return False
        for owner, name, around in places:
            self.wrap(seam, owner, name, around)
        return self.live(seam)

    def report(self) -> tuple[SeamReport, ...]:
        return tuple(
            SeamReport(seam.name, seam.kind, seam.since, state, seam.without_it) for seam, state in self._states.values()
        )


def seams_switched_off() -> frozenset[str]:
    """Names in the environment variable, trimmed."""
    return frozenset(name.strip() for name in os.environ.get(OFF_VARIABLE, "").split(",") if name.strip())
