"""The table of seams: every place where the pack holds on to ComfyUI, probed, installed once, and reported."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ...vram.status import SeamReport

logger = logging.getLogger("vram_headroom")

MARK = "__vram_headroom_seam__"
"""Set on our wrappers, so that a module loaded twice does not wrap twice."""


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
PROMPT_SPAN = Seam("prompt start and end", "private", "0.8", "loaded models count as idle while a prompt runs")
NODE_SPAN = Seam("node start and end", "private", "0.8", "the running node is not shown, elastic models are not read")
LOADED_MODELS = Seam("list of loaded models", "private", "0.8", "what is loaded already counts as other programs' memory")
MEMORY_READING = Seam("ComfyUI's memory reading", "private", "0.8", "cards that only ComfyUI can read show no numbers")
SOURCE_FILES = Seam(
    "file of a loaded model", "private", "0.16", "models of stock loaders are not matched with the graph's files"
)


@dataclass(slots=True)
class SeamTable:
    """What became of each seam. Filled while the pack connects, read by the status route."""

    _states: dict[str, tuple[Seam, Literal["live", "absent", "off"]]] = field(default_factory=dict)

    def note(self, seam: Seam, live: bool) -> bool:
        """Record whether `seam` serves; says so once in the log where it does not. Returns `live`."""
        self._states[seam.name] = (seam, "live" if live else "absent")
        if not live:
            logger.info("this ComfyUI has no %s: %s", seam.name, seam.without_it)
        return live

    def wrap(self, seam: Seam, owner: object, name: str, around: Callable[..., Any]) -> bool:
        """Put `around(original, *args, **kwargs)` before whatever `owner.name` is now, ours or another pack's.

        Coroutine functions stay coroutine functions. Installing twice leaves one wrapper.
        """
        original = getattr(owner, name, None)
        if not callable(original):
            return self.note(seam, live=False)
        if getattr(original, MARK, None) == seam.name:
            return self.note(seam, live=True)

        @functools.wraps(original)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return await around(original, *args, **kwargs)

        @functools.wraps(original)
        def called(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        wrapper = awaited if inspect.iscoroutinefunction(original) else called

        setattr(wrapper, MARK, seam.name)
        setattr(owner, name, wrapper)
        return self.note(seam, live=True)

    def report(self) -> tuple[SeamReport, ...]:
        return tuple(
            SeamReport(seam.name, seam.kind, seam.since, state, seam.without_it) for seam, state in self._states.values()
        )
