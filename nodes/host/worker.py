"""What other threads ask of models, done where models may be touched: on ComfyUI's worker thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import comfy.model_management as model_management
import execution
from server import PromptServer

from .seams import IDLE_QUEUE, QUEUE_LENGTH, QUEUE_WAIT, SeamTable

logger = logging.getLogger("vram_headroom")

T = TypeVar("T")

WAKE_FLAG = "vram_headroom"
"""A flag of ComfyUI's queue that only wakes its worker, which passes by `get_flags` whenever it has nothing to run."""


REENTRANT = type(threading.RLock())
"""Of ComfyUI's queue; its wait lets go of one however often it is held."""


class WorkerQueue:
    """Calls that wait for a node boundary or for an idle queue. Any thread submits; the worker thread drains."""

    def __init__(self, seams: SeamTable, wake: Callable[[], None]) -> None:
        """`wake` makes the end of the node that runs a boundary."""
        self._seams = seams
        self._wake = wake
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._draining = False
        self._at_idle: list[Callable[[], None]] = []
        seams.wrap(IDLE_QUEUE, execution.PromptQueue, "get_flags", self._around_flags)
        seams.wrap(QUEUE_WAIT, execution.PromptQueue, "get", self._around_get)
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
        self._wake()
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
        # only the worker asks for its flags, between two prompts; they are taken before the calls they stand for, so that none
        # is taken of a call that comes meanwhile
        flags = original(*args, **kwargs)
        if isinstance(flags, dict):
            flags.pop(WAKE_FLAG, None)
        self._drain_between_prompts()
        if not self._remaining():
            for call in self._at_idle:
                _guarded(call)
        return flags

    def _around_get(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's worker does not look at its flags before it waits: one that was set while it was busy would wake nobody."""
        lock = getattr(args[0], "mutex", None) if args else None
        if not isinstance(lock, REENTRANT):
            return original(*args, **kwargs)
        # who submits sets a flag under this lock, so nothing comes between the look and the wait, which lets go of it
        lock.acquire()
        try:
            while not self._waiting.empty() and not self._draining:
                lock.release()
                try:
                    self._drain_between_prompts()
                finally:
                    lock.acquire()
            return original(*args, **kwargs)
        finally:
            lock.release()

    def _drain_between_prompts(self) -> None:
        _guarded(self.drain)

    @staticmethod
    def _host_queue() -> Any:
        return getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)


def _guarded(call: Callable[[], None]) -> None:
    """Between two prompts there is nobody to whom an interrupt could go on: it would end ComfyUI's worker thread."""
    try:
        call()
    except (Exception, model_management.InterruptProcessingException):
        logger.exception("what waited for an idle queue could not be done")
