"""A thread that is there only while it has something to do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any


class BriefThread(Executor):
    """One call after the other, in order, on a thread that ends with the last of them. It keeps no process from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._runs = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Raises RuntimeError where the system gives no thread."""
        future: Future[Any] = Future()
        with self._lock:
            if not self._runs:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
                self._runs = True
            self._calls.append((future, partial(fn, *args, **kwargs)))
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._runs = False
                    return
                future, call = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            # what it made is the asker's alone
            del future, call
