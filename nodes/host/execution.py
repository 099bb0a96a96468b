"""What ComfyUI executes right now: prompt and node start and end, seen on its worker thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import execution
from comfy_execution.utils import get_executing_context

from ...vram.status import Running
from .seams import NODE_SPAN, PROMPT_SPAN, SeamTable

logger = logging.getLogger("vram_headroom")


class HostExecution:
    """The running prompt and node. Read from any thread; written by the worker thread only."""

    def __init__(self, seams: SeamTable) -> None:
        self._running: Running | None = None
        self._boundaries: list[Callable[[], None]] = []
        self._starts: list[Callable[[object, str, list[str] | None], None]] = []
        seams.wrap(PROMPT_SPAN, execution.PromptExecutor, "execute", self._around_prompt)
        seams.wrap(NODE_SPAN, execution, "get_output_data", self._around_node)

    @property
    def running(self) -> Running | None:
        return self._running

    def at_boundary(self, call: Callable[[], None]) -> None:
        """Call this on the worker thread whenever a node or a prompt has ended."""
        self._boundaries.append(call)

    def at_start(self, call: Callable[[object, str, list[str] | None], None]) -> None:
        """Call this on the worker thread before a prompt runs: with it, its id and the output nodes that were asked for."""
        self._starts.append(call)

    def current_node(self) -> str | None:
        """The node whose function is running on this thread."""
        context = get_executing_context()
        return context.node_id if context else None

    def _around_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # execute(self, prompt, prompt_id, ...): the id is the third positional argument in every release seen
        prompt_id = kwargs.get("prompt_id", args[2] if len(args) > 2 else "")
        prompt = kwargs.get("prompt", args[1] if len(args) > 1 else None)
        outputs = kwargs.get("execute_outputs", args[4] if len(args) > 4 else None)
        for call in self._starts:
            _guarded(lambda call=call: call(prompt, str(prompt_id), outputs or None))
        self._running = Running(str(prompt_id), None)
        try:
            return original(*args, **kwargs)
        finally:
            self._running = None
            self._tell()

    async def _around_node(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        node_id = kwargs.get("unique_id", args[1] if len(args) > 1 else None)
        if self._running is not None:
            self._running = self._running._replace(node_id=str(node_id))
        try:
            return await original(*args, **kwargs)
        finally:
            self._tell()

    def _tell(self) -> None:
        for call in self._boundaries:
            _guarded(call)


def _guarded(call: Callable[[], None]) -> None:
    """What is raised here would fail the node, or end ComfyUI's worker thread for good."""
    try:
        call()
    except Exception:
        logger.exception("what is known of the loaded models could not be updated")
