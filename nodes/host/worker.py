"""What other threads ask of models, done where models may be touched: on ComfyUI's worker thread."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import execution
from server import PromptServer

from .seams import IDLE_QUEUE, QUEUE_LENGTH, SeamTable

logger = logging.getLogger("vram_headroom")

T = TypeVar("T")

WAKE_FLAG = "vram_headroom"
"""A flag of ComfyUI's queue that only wakes its worker, which passes by `get_flags` whenever it has nothing to run."""


class WorkerQueue:
    """Calls that wait for a node boundary or for an idle queue. Any thread submits; the worker thread drains."""

    def __init__(self, seams: SeamTable) -> None:
        self._seams = seams
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._draining = False
        self._at_idle: list[Callable[[], None]] = []
        seams.wrap(IDLE_QUEUE, execution.PromptQueue, "get_flags", self._around_flags)
        seams.note(QUEUE_LENGTH, live=callable(getattr(execution.PromptQueue, "get_tasks_remaining", None)))

    @property
    def tells_when_idle(self) -> bool:
        return self._seams.live(IDLE_QUEUE) and self._seams.live(QUEUE_LENGTH)

    def at_idle(self, call: Callable[[], None]) -> None:
        """Call this on the worker thread whenever it has nothing to run and nothing waits, if `tells_when_idle`."""
        self._at_idle.append(call)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """`call` will run on the worker thread; the future holds what came of it. Cancelled in time, it never runs."""
        future: Future[T] = Future()
        self._waiting.put((future, call))
        wake = getattr(self._host_queue(), "set_flag", None)
        if self._seams.live(IDLE_QUEUE) and callable(wake):
            wake(WAKE_FLAG, True)
        return future

    def drain(self) -> None:
        """Do what waits. Worker thread only; what a call submits itself is done as well."""
        if self._draining or self._waiting.empty():
            return
        self._draining = True
        try:
            while not self._waiting.empty():
                future, call = self._waiting.get()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)
                except BaseException as error:
                    # an interrupt is the prompt's, and goes on
                    future.set_exception(error)
                    raise
        finally:
            self._draining = False

    def prompts_waiting(self) -> int:
        """Prompts queued behind the one that runs; 0 where that can't be known."""
        # the running one is counted until it is done
        return max(0, self._remaining() - 1)

    def _remaining(self) -> int:
        remaining: Callable[[], int] | None = getattr(self._host_queue(), "get_tasks_remaining", None)
        return remaining() if self._seams.live(QUEUE_LENGTH) and callable(remaining) else 0

    def _around_flags(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # only the worker asks for its flags, between two prompts
        try:
            self.drain()
            if not self._remaining():
                for call in self._at_idle:
                    call()
        except Exception:
            logger.exception("what waited for an idle queue could not be done")
        flags = original(*args, **kwargs)
        if isinstance(flags, dict):
            flags.pop(WAKE_FLAG, None)
        return flags

    @staticmethod
    def _host_queue() -> Any:
        return getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
