"""Results of the last run that ComfyUI still has: what is in its node cache need not be computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import execution
import nodes as comfy_nodes

from ...vram.plan.rerun import Kept
from .execution import HostExecution, PromptSpan, prompt_span
from .seams import NODE_CACHE, PROMPT_SPAN, SeamTable

CORE: tuple[str, ...] = ("comfy_api.",)
"""Modules whose own `fingerprint_inputs` means that a node has none."""


class HostNodeCache:
    """Looks into the cache of the executor that ran last. Read from any thread; written by the worker thread only."""

    def __init__(self, seams: SeamTable, runs: HostExecution) -> None:
        self._seams = seams
        self._executor: Callable[[], Any] = lambda: None
        self._last: tuple[str, Mapping[str, Any]] | None = None
        self._replaced: tuple[str, Mapping[str, Any]] | None = None
        """By the last, and kept until nothing runs or one more has: freeing the thousand objects of a large graph takes 0.1 ms,
        and not of the prompt that runs."""
        self._runs = False
        if not seams.live(PROMPT_SPAN):
            seams.wrap(NODE_CACHE, execution.PromptExecutor, "execute", self._around)
        elif seams.note(NODE_CACHE, live=True):
            # whoever is told of a prompt's start may still ask for the results of the last
            runs.watch_innermost(self)

    def _around(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Where nobody tells of prompts."""
        if self._runs:
            # a node that runs a graph of its own
            return original(*args, **kwargs)
        span = prompt_span(*args, **kwargs)
        self.prompt_started(span)
        try:
            return original(*args, **kwargs)
        finally:
            self.prompt_ended(span)

    def prompt_started(self, span: PromptSpan) -> None:
        self._runs = True

    def prompt_ended(self, span: PromptSpan) -> None:
        self._replaced, self._last = self._last, None
        if isinstance(span.prompt, dict):
            self._executor = span.executor
            self._last = (span.prompt_id, span.prompt)
        self._runs = False

    def tidy(self) -> None:
        """For when nothing runs."""
        self._replaced = None

    def kept(self) -> Kept | None:
        """What there is of the last run; None while one runs, and where the cache can't be read."""
        last, executor = self._last, self._executor()
        if last is None or executor is None or self._runs:
            return None
        run, prompt = last
        outputs = getattr(getattr(executor, "caches", None), "outputs", None)
        keys, store = getattr(outputs, "cache_key_set", None), getattr(outputs, "cache", None)
        key_of = getattr(keys, "get_data_key", None)
        if not callable(key_of) or not isinstance(store, dict):
            return None  # it keeps nothing (--cache-none), or was emptied
        there = frozenset(node_id for node_id in prompt if (key := key_of(node_id)) is not None and key in store)
        classes = {node.get("class_type") for node in prompt.values() if isinstance(node, dict)}
        return Kept(run, prompt, there, frozenset(str(name) for name in classes if _tells_when_it_runs(name)))


def _tells_when_it_runs(name: object) -> bool:
    """Whether a node class has its own say on what has changed; one that ComfyUI does not know may."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS.get(name) if isinstance(name, str) else None
    if node is None or hasattr(node, "IS_CHANGED"):
        return True
    return any("fingerprint_inputs" in vars(base) and not base.__module__.startswith(CORE) for base in node.__mro__)
