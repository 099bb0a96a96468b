"""Runs prompts as ComfyUI 0.33 does: the same order, messages, errors and module-global functions, own code.

Not here: cache providers, and asynchronous nodes that run beside others.
"""

import asyncio
import inspect
import logging
import sys
import time
import traceback
from collections.abc import Callable
from enum import Enum
from typing import Any

import comfy.memory_management as memory_management
import comfy.model_management as model_management
import comfy_aimdo.model_vbar
import nodes
import torch
from comfy_execution.caching import CacheEntry, OutputCache, Signatures
from comfy_execution.graph import DependencyCycleError, DynamicPrompt, ExecutionList, NodeInputError, get_input_info
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder, is_link
from comfy_execution.progress import get_progress_state, reset_progress_state
from comfy_execution.utils import CurrentNodeContext
from prompt_queue import PromptQueue
from prompt_validation import full_type_name
from prompt_validation import validate_prompt as validate_prompt
from standin.holds import holds
from standin.journal import journal

SENSITIVE_EXTRA_DATA_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")

InputData = dict[str, list[Any]]


class ExecutionResult(Enum):
    SUCCESS = 0
    FAILURE = 1
    PENDING = 2


def get_input_data(
    inputs: dict[str, Any],
    class_def: Any,
    unique_id: str,
    execution_list: Any = None,
    dynprompt: DynamicPrompt | None = None,
    extra_data: dict[str, Any] = {},  # noqa: B006
) -> tuple[InputData, dict[str, bool], dict[str, Any]]:
    """Each input as a list of values; the names whose value is not there yet; what V3 nodes would need besides."""
    definitions = nodes.inputs_of(class_def, inputs)
    data: InputData = {}
    missing: dict[str, bool] = {}
    for name, value in inputs.items():
        _, category, options = get_input_info(class_def, name, definitions)
        if is_link(value) and not (options and options.get("rawLink")):
            entry = None if execution_list is None else execution_list.get_cache(value[0], unique_id)
            if entry is None or value[1] >= len(entry.outputs):
                missing[name] = True
                data[name] = [None]
            else:
                data[name] = entry.outputs[value[1]]
        elif category is not None:
            data[name] = [value]
    hidden = {
        "PROMPT": dynprompt.get_original_prompt() if dynprompt else {},
        "DYNPROMPT": dynprompt,
        "EXTRA_PNGINFO": extra_data.get("extra_pnginfo"),
        "UNIQUE_ID": unique_id,
    }
    for name, kind in definitions.get("hidden", {}).items():
        kind = kind[0] if isinstance(kind, list | tuple) else kind
        if kind in hidden:
            data[name] = [hidden[kind]]
    return data, missing, {}


async def map_over_lists(
    prompt_id: str,
    unique_id: str,
    obj: Any,
    input_data_all: InputData,
    function: str,
    allow_interrupt: bool = False,
    execution_block_cb: Callable[[ExecutionBlocker], Any] | None = None,
    pre_execute_cb: Callable[[int], None] | None = None,
) -> list[Any]:
    """Call the node's function once per entry of its longest input; shorter ones repeat their last value."""
    bound = getattr(obj, function)

    async def call(arguments: dict[str, Any], index: int | None) -> Any:
        if allow_interrupt:
            nodes.before_node_execution()
        for value in arguments.values():
            for one in value if getattr(obj, "INPUT_IS_LIST", False) else [value]:
                if isinstance(one, ExecutionBlocker):
                    return execution_block_cb(one) if execution_block_cb else one
        if pre_execute_cb is not None and index is not None:
            pre_execute_cb(index)
        with CurrentNodeContext(prompt_id, unique_id, index):
            result = bound(**arguments)
            return await result if inspect.isawaitable(result) else result

    if getattr(obj, "INPUT_IS_LIST", False):
        return [await call(input_data_all, 0)]
    longest = max((len(values) for values in input_data_all.values()), default=0)
    if longest == 0:
        return [await call({}, None)]
    return [
        await call({name: values[min(index, len(values) - 1)] for name, values in input_data_all.items()}, index)
        for index in range(longest)
    ]


async def get_output_data(
    prompt_id: str,
    unique_id: str,
    obj: Any,
    input_data_all: InputData,
    execution_block_cb: Callable[[ExecutionBlocker], Any] | None = None,
    pre_execute_cb: Callable[[int], None] | None = None,
    v3_data: dict[str, Any] | None = None,
) -> tuple[list[Any], dict[str, Any], bool, bool]:
    """Run one node: its outputs as lists, what it shows in the browser, whether the outputs are graphs it expanded into, and a
    flag that is never set here."""
    returned = await map_over_lists(
        prompt_id,
        unique_id,
        obj,
        input_data_all,
        obj.FUNCTION,
        allow_interrupt=True,
        execution_block_cb=execution_block_cb,
        pre_execute_cb=pre_execute_cb,
    )
    results: list[Any] = []
    shown: list[dict[str, Any]] = []
    graphs: list[Any] = []
    for one in returned:
        graph = None
        if isinstance(one, dict):
            graph = one.get("expand")
            if "ui" in one:
                shown.append(one["ui"])
            if "result" not in one:
                continue
            one = one["result"]
        results.append((one,) * len(obj.RETURN_TYPES) if isinstance(one, ExecutionBlocker) else one)
        graphs.append(graph)
    if any(graph is not None for graph in graphs):
        return list(zip(graphs, results, strict=True)), {}, True, False
    ui = {key: [value for part in shown for value in part[key]] for key in shown[0]} if shown else {}
    return _merge(results, obj) if results else [], ui, False, False


def _merge(results: list[Any], obj: Any) -> list[list[Any]]:
    as_list = getattr(obj, "OUTPUT_IS_LIST", [False] * len(results[0]))
    merged: list[list[Any]] = []
    for index, is_list in enumerate(as_list):
        column: list[Any] = []
        for result in results:
            column.extend(result[index]) if is_list else column.append(result[index])
        merged.append(column)
    return merged


def format_value(x: Any) -> Any:
    return x if x is None or isinstance(x, int | float | bool | str) else str(x)


class PromptExecutor:
    def __init__(self, server: Any, cache_type: Any = False, cache_args: Any = None) -> None:
        self.server = server
        self.cache_type = cache_type
        self.cache_args = cache_args
        self.history_result: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        self.outputs = OutputCache()
        self.objects: dict[tuple[str, str], Any] = {}
        self.status_messages: list[tuple[str, dict[str, Any]]] = []
        self.success = True

    def add_message(self, event: str, data: dict[str, Any], broadcast: bool) -> None:
        data = {**data, "timestamp": int(time.time() * 1000)}
        self.status_messages.append((event, data))
        if self.server.client_id is not None or broadcast:
            self.server.send_sync(event, data, self.server.client_id)

    def execute(
        self,
        prompt: dict[str, Any],
        prompt_id: str,
        extra_data: dict[str, Any] = {},  # noqa: B006
        execute_outputs: list[str] = [],  # noqa: B006
    ) -> None:
        asyncio.run(self.execute_async(prompt, prompt_id, extra_data, execute_outputs))

    async def execute_async(
        self,
        prompt: dict[str, Any],
        prompt_id: str,
        extra_data: dict[str, Any] = {},  # noqa: B006
        execute_outputs: list[str] = [],  # noqa: B006
    ) -> None:
        nodes.interrupt_processing(False)
        self.server.client_id = extra_data.get("client_id")
        self.status_messages = []
        self.success = True
        self.add_message("execution_start", {"prompt_id": prompt_id}, broadcast=False)
        with torch.inference_mode():
            await _Run(self, prompt, prompt_id, extra_data).run(execute_outputs)
        self.server.last_node_id = None


class _Run:
    """One prompt, from the cached nodes to success or the first failure."""

    def __init__(self, executor: PromptExecutor, prompt: dict[str, Any], prompt_id: str, extra_data: dict[str, Any]) -> None:
        self.executor = executor
        self.server = executor.server
        self.outputs = executor.outputs
        self.prompt_id = prompt_id
        self.extra_data = extra_data
        self.dynprompt = DynamicPrompt(prompt)
        self.executed: set[str] = set()
        self.ui: dict[str, dict[str, Any]] = {}
        self.expanded: dict[str, list[tuple[bool, Any]]] = {}
        """Nodes that expanded and wait for what they became."""

    async def run(self, execute_outputs: list[str]) -> None:
        reset_progress_state(self.prompt_id, self.dynprompt, self.server)
        is_changed = {node_id: await self._is_changed(node_id) for node_id in self.dynprompt.all_node_ids()}
        self.outputs.set_prompt(Signatures(self.dynprompt, is_changed), self.dynprompt.original_prompt)
        cached = [node_id for node_id in self.dynprompt.original_prompt if self.outputs.get(node_id) is not None]
        model_management.cleanup_models_gc()
        self.executor.add_message("execution_cached", {"nodes": cached, "prompt_id": self.prompt_id}, broadcast=False)
        pending = ExecutionList(self.dynprompt, self.outputs)
        for node_id in execute_outputs:
            pending.add_node(node_id)
        while not pending.is_empty():
            try:
                node_id = pending.next_node()
            except DependencyCycleError as error:
                self._fail(pending.blame(), error, "graph.DependencyCycleError", [], {})
                break
            result = await self._execute(node_id, pending)
            if result is ExecutionResult.FAILURE:
                break
            if result is ExecutionResult.SUCCESS:
                pending.complete(node_id)
        else:
            self.executor.add_message("execution_success", {"prompt_id": self.prompt_id}, broadcast=False)
        self.executor.history_result = {
            "outputs": {node_id: shown["output"] for node_id, shown in self.ui.items()},
            "meta": {node_id: shown["meta"] for node_id, shown in self.ui.items()},
        }

    async def _is_changed(self, node_id: str) -> Any:
        node = self.dynprompt.get_node(node_id)
        class_def = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        if not hasattr(class_def, "IS_CHANGED"):
            return False
        data, _, _ = get_input_data(node["inputs"], class_def, node_id)
        try:
            return await map_over_lists(self.prompt_id, node_id, class_def, data, "IS_CHANGED")
        except Exception as error:
            logging.warning("WARNING: %s", error)
            return float("nan")

    async def _execute(self, node_id: str, pending: ExecutionList) -> ExecutionResult:
        cached = self.outputs.get(node_id)
        if cached is not None:
            self._show_cached(node_id, cached)
            get_progress_state().finish_progress(node_id)
            return ExecutionResult.SUCCESS
        data: InputData | None = None
        node = self.dynprompt.get_node(node_id)
        try:
            class_def = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
            if node_id in self.expanded:
                output = _merge(self._resolve(node_id, pending), class_def)
                self.outputs.set(node_id, CacheEntry(None, output))
                get_progress_state().finish_progress(node_id)
                self.executed.add(node_id)
                return ExecutionResult.SUCCESS
            get_progress_state().start_progress(node_id)
            data, missing, v3_data = get_input_data(
                node["inputs"], class_def, node_id, pending, self.dynprompt, self.extra_data
            )
            self._send_executing(node_id)
            obj = self.executor.objects.setdefault((node_id, node["class_type"]), None) or class_def()
            self.executor.objects[node_id, node["class_type"]] = obj
            if await self._ask_for_lazy_inputs(node_id, obj, data, missing, pending):
                return ExecutionResult.PENDING
            journal.note("node_start", node=node_id, class_type=node["class_type"])
            holds.reach(node_id, None, model_management.processing_interrupted)
            try:
                output, ui, has_subgraph, _ = await get_output_data(
                    self.prompt_id,
                    node_id,
                    obj,
                    data,
                    execution_block_cb=self._blocked(node_id),
                    pre_execute_cb=lambda index: GraphBuilder.set_default_prefix(node_id, index, 0),
                    v3_data=v3_data,
                )
            finally:
                if memory_management.aimdo_enabled:
                    # 0.33, execution.py:546-552
                    model_management.reset_cast_buffers()
                    comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
                journal.note("node_end", node=node_id)
            if has_subgraph:
                self._expand(node_id, output, pending)
                return ExecutionResult.PENDING
            self._show(node_id, ui)
            self.outputs.set(node_id, CacheEntry(self.ui.get(node_id), output))
        except model_management.InterruptProcessingException as error:
            logging.info("Processing interrupted")
            self._fail(node_id, error, "", [], {})
            return ExecutionResult.FAILURE
        except Exception as error:
            self._report(node_id, error, data)
            return ExecutionResult.FAILURE
        get_progress_state().finish_progress(node_id)
        self.executed.add(node_id)
        return ExecutionResult.SUCCESS

    def _expand(self, node_id: str, returned: list[Any], pending: ExecutionList) -> None:
        """Add what the node became; it waits until its outputs are there."""
        added: list[str] = []
        self.expanded[node_id] = []
        for graph, outputs in returned:
            self.expanded[node_id].append((graph is not None, outputs))
            for new_id, info in (graph or {}).items():
                self.dynprompt.add_ephemeral_node(new_id, info, node_id, info.get("override_display_id", node_id))
                added.append(new_id)
        self.outputs.keep_inside(node_id, added)
        for new_id in added:
            if getattr(nodes.NODE_CLASS_MAPPINGS[self.dynprompt.get_node(new_id)["class_type"]], "OUTPUT_NODE", False):
                pending.add_node(new_id)
        for is_graph, outputs in self.expanded[node_id]:
            for value in outputs if is_graph else ():
                if is_link(value):
                    pending.add_strong_link(value[0], value[1], node_id)

    def _resolve(self, node_id: str, pending: ExecutionList) -> list[Any]:
        """The outputs of a node that expanded, from those of what it became."""
        results = []
        for is_graph, outputs in self.expanded.pop(node_id):
            values: list[Any] = []
            for value in outputs:
                values.extend(
                    pending.get_cache(value[0], node_id).outputs[value[1]] if is_graph and is_link(value) else [value]
                )
            results.append(tuple(values))
        return results

    async def _ask_for_lazy_inputs(
        self, node_id: str, obj: Any, data: InputData, missing: dict[str, bool], pending: ExecutionList
    ) -> bool:
        if not hasattr(obj, "check_lazy_status"):
            return False
        answers = await map_over_lists(self.prompt_id, node_id, obj, data, "check_lazy_status", allow_interrupt=True)
        wanted = {name for answer in answers if isinstance(answer, list) for name in answer if isinstance(name, str)}
        needed = [name for name in wanted if name not in data or name in missing]
        for name in needed:
            pending.make_input_strong_link(node_id, name)
        return bool(needed)

    def _send_executing(self, node_id: str) -> None:
        if self.server.client_id is not None:
            shown = self.dynprompt.get_display_node_id(node_id)
            self.server.last_node_id = shown
            message = {"node": node_id, "display_node": shown, "prompt_id": self.prompt_id}
            self.server.send_sync("executing", message, self.server.client_id)

    def _show(self, node_id: str, ui: dict[str, Any]) -> None:
        if not ui:
            return
        meta = {
            "node_id": node_id,
            "display_node": self.dynprompt.get_display_node_id(node_id),
            "parent_node": self.dynprompt.get_parent_node_id(node_id),
            "real_node_id": self.dynprompt.get_real_node_id(node_id),
        }
        self.ui[node_id] = {"meta": meta, "output": ui}
        self._send_executed(node_id, ui)

    def _show_cached(self, node_id: str, cached: CacheEntry) -> None:
        if cached.ui is not None:
            self.ui[node_id] = cached.ui
        self._send_executed(node_id, (cached.ui or {}).get("output"))

    def _send_executed(self, node_id: str, output: Any) -> None:
        if self.server.client_id is not None:
            shown = self.dynprompt.get_display_node_id(node_id)
            message = {"node": node_id, "display_node": shown, "output": output, "prompt_id": self.prompt_id}
            self.server.send_sync("executed", message, self.server.client_id)

    def _blocked(self, node_id: str) -> Callable[[ExecutionBlocker], ExecutionBlocker]:
        def blocked(block: ExecutionBlocker) -> ExecutionBlocker:
            if block.message is None:
                return block
            message = {
                "prompt_id": self.prompt_id,
                "node_id": node_id,
                "node_type": self.dynprompt.get_node(node_id)["class_type"],
                "executed": list(self.executed),
                "exception_message": f"Execution Blocked: {block.message}",
                "exception_type": "ExecutionBlocked",
                "traceback": [],
                "current_inputs": [],
                "current_outputs": [],
            }
            self.server.send_sync("execution_error", message, self.server.client_id)
            return ExecutionBlocker(None)

        return blocked

    def _report(self, node_id: str, error: Exception, data: InputData | None) -> None:
        kind, _, trace = sys.exc_info()
        logging.error("!!! Exception during processing !!! %s", error)
        logging.error(traceback.format_exc())
        tips = ""
        if model_management.is_oom(error):
            tips = (
                "This error means you ran out of memory on your GPU.\n\n"
                "TIPS: If the workflow worked before you might have accidentally set the batch_size to a large number."
            )
            logging.info("Memory summary:\n%s", model_management.debug_memory_summary())
            logging.error("Got an OOM, unloading all loaded models.")
            model_management.unload_all_models()
        formatted = {name: [format_value(value) for value in values] for name, values in (data or {}).items()}
        self._fail(node_id, error, full_type_name(kind), traceback.format_tb(trace), formatted, f"{error}\n{tips}")

    def _fail(
        self,
        node_id: str,
        error: BaseException,
        kind: str,
        trace: list[str],
        inputs: dict[str, Any],
        text: str | None = None,
    ) -> None:
        self.executor.success = False
        real_id = self.dynprompt.get_real_node_id(node_id)
        message: dict[str, Any] = {
            "prompt_id": self.prompt_id,
            "node_id": real_id,
            "node_type": self.dynprompt.get_node(real_id)["class_type"],
            "executed": list(self.executed),
        }
        if isinstance(error, model_management.InterruptProcessingException):
            self.executor.add_message("execution_interrupted", message, broadcast=True)
            return
        message |= {
            "exception_message": str(error) if text is None else text,
            "exception_type": kind,
            "traceback": trace,
            "current_inputs": inputs,
            "current_outputs": list(self.dynprompt.all_node_ids()),
        }
        self.executor.add_message("execution_error", message, broadcast=False)


__all__ = ["NodeInputError", "PromptExecutor", "PromptQueue", "get_output_data", "validate_prompt"]
