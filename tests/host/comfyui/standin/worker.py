"""The worker thread: takes prompts from the queue and runs them, one at a time, as ComfyUI's main does."""

import gc
import logging
import time
from typing import Any

import comfy.model_management as model_management
import comfy.utils
import execution
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

GC_SECONDS = 10.0
"""Between two collections (main.py:401 in 0.33)."""


def hook_progress(server: Any) -> None:
    """Progress bars tell the browser, and are where an interrupt is noticed."""

    def hook(value: int, total: int, preview: Any, prompt_id: str | None = None, node_id: str | None = None) -> None:
        context = get_executing_context()
        if context is not None:
            prompt_id = prompt_id or context.prompt_id
            node_id = node_id or context.node_id
        model_management.throw_exception_if_processing_interrupted()
        prompt_id = prompt_id or server.last_prompt_id
        node_id = node_id or server.last_node_id
        get_progress_state().update_progress(node_id or "", value, total, preview)
        message = {"value": value, "max": total, "prompt_id": prompt_id, "node": node_id}
        server.send_sync("progress", message, server.client_id)

    comfy.utils.set_progress_bar_global_hook(hook)


def work(queue: execution.PromptQueue, server: Any) -> None:
    executor = execution.PromptExecutor(server)
    collected, garbage = 0.0, False
    while True:
        # what a prompt leaves is collected when nothing else is done, and at most this often
        timeout = max(GC_SECONDS - (time.perf_counter() - collected), 0.0) if garbage else 1000.0
        taken = queue.get(timeout=timeout)
        if taken is not None:
            _run_one(executor, queue, server, *taken)
            garbage = True
        flags = queue.get_flags()
        if flags.get("unload_models", flags.get("free_memory")):
            model_management.unload_all_models()
            collected, garbage = 0.0, True
        if flags.get("free_memory"):
            executor.reset()
            collected, garbage = 0.0, True
        if garbage and time.perf_counter() - collected > GC_SECONDS:
            gc.collect()
            model_management.soft_empty_cache()
            collected, garbage = time.perf_counter(), False


def _run_one(executor: execution.PromptExecutor, queue: execution.PromptQueue, server: Any, item: Any, item_id: int) -> None:
    _, prompt_id, prompt, extra_data, outputs, sensitive = item
    server.last_prompt_id = prompt_id
    try:
        executor.execute(prompt, prompt_id, extra_data | sensitive, outputs)
    except Exception:
        # ComfyUI's worker dies here; a stand-in whose worker died would only hide what broke.
        logging.exception("the executor itself failed")
        executor.success = False
    status = execution.PromptQueue.ExecutionStatus(
        "success" if executor.success else "error", executor.success, executor.status_messages
    )
    queue.task_done(item_id, executor.history_result, status, process_item=lambda done: done[:5])
    if server.client_id is not None:
        server.send_sync("executing", {"node": None, "prompt_id": prompt_id}, server.client_id)
