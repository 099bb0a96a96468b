"""What waits, what runs, and what was. `execution` offers it under ComfyUI's name."""

import copy
import heapq
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import nodes


class PromptQueue:
    class ExecutionStatus(NamedTuple):
        status_str: str
        completed: bool
        messages: list[Any]

    def __init__(self, server: Any) -> None:
        self.server = server
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self._settled = threading.Condition(self.mutex)
        self._worker_waits = False
        self.task_counter = 0
        self.queue: list[Any] = []
        self.currently_running: dict[int, Any] = {}
        self.history: dict[str, dict[str, Any]] = {}
        self.flags: dict[str, Any] = {}

    def put(self, item: Any) -> None:
        with self.mutex:
            heapq.heappush(self.queue, item)
            self.server.queue_updated()
            self.not_empty.notify()

    def get(self, timeout: float | None = None) -> Any:
        """The next item and its id; None when a flag was set or the time is over."""
        with self.not_empty:
            # A flag may have been set while the worker was busy, when nobody waited for its notification.
            if not self.queue and not self.flags:
                self._worker_waits = True
                self._settled.notify_all()
                self.not_empty.wait(timeout=timeout)
                self._worker_waits = False
            if not self.queue:
                return None
            item = heapq.heappop(self.queue)
            item_id = self.task_counter
            self.currently_running[item_id] = copy.deepcopy(item)
            self.task_counter += 1
            self.server.queue_updated()
            return item, item_id

    def wait_until_idle(self, timeout: float) -> bool:
        """Not in ComfyUI: whether everything asked of the worker is done, within `timeout` seconds."""
        with self.mutex:
            return self._settled.wait_for(lambda: self._worker_waits and not self.queue and not self.flags, timeout)

    def task_done(
        self,
        item_id: int,
        history_result: dict[str, Any],
        status: "PromptQueue.ExecutionStatus | None",
        process_item: Callable[[Any], Any] | None = None,
    ) -> None:
        with self.mutex:
            prompt = self.currently_running.pop(item_id)
            prompt = process_item(prompt) if process_item else prompt
            done = {"prompt": prompt, "outputs": {}, "status": status._asdict() if status else None}
            self.history[prompt[1]] = done | history_result
            self.server.queue_updated()

    def get_current_queue(self) -> tuple[list[Any], list[Any]]:
        with self.mutex:
            return list(self.currently_running.values()), copy.deepcopy(self.queue)

    get_current_queue_volatile = get_current_queue

    def interrupt_if_running(self, prompt_id: str) -> bool:
        with self.mutex:
            running = any(item[1] == prompt_id for item in self.currently_running.values())
            if running:
                nodes.interrupt_processing()
            return running

    def get_tasks_remaining(self) -> int:
        with self.mutex:
            return len(self.queue) + len(self.currently_running)

    def wipe_queue(self) -> None:
        with self.mutex:
            self.queue = []
            self.server.queue_updated()

    def delete_queue_item(self, function: Callable[[Any], bool]) -> bool:
        with self.mutex:
            for item in self.queue:
                if function(item):
                    self.queue.remove(item)
                    heapq.heapify(self.queue)
                    self.server.queue_updated()
                    return True
            return False

    def get_history(
        self,
        prompt_id: str | None = None,
        max_items: int | None = None,
        offset: int = -1,
        map_function: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        with self.mutex:
            chosen = list(self.history.items())
            if prompt_id is not None:
                chosen = [(known, entry) for known, entry in chosen if known == prompt_id]
            elif max_items is not None:
                start = max(0, len(chosen) - max_items if offset < 0 else offset)
                chosen = chosen[start : start + max_items]
            return {known: map_function(entry) if map_function else copy.copy(entry) for known, entry in chosen}

    def wipe_history(self) -> None:
        with self.mutex:
            self.history = {}

    def delete_history_item(self, id_to_delete: str) -> None:
        with self.mutex:
            self.history.pop(id_to_delete, None)

    def set_flag(self, name: str, data: Any) -> None:
        with self.mutex:
            self.flags[name] = data
            self.not_empty.notify()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        with self.mutex:
            flags = dict(self.flags)
            if reset:
                self.flags = {}
            return flags
