"""What ComfyUI executes right now: prompt and node start and end, seen on its worker thread."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

import execution
from comfy_execution.utils import get_executing_context

from ...vram.run_record import RunState
from ...vram.status import Running
from .seams import NODE_SPAN, PROMPT_SPAN, SeamTable

logger = logging.getLogger("vram_headroom")

OUTCOMES: Final[Mapping[str, RunState]] = MappingProxyType(
    {"execution_success": "done", "execution_error": "failed", "execution_interrupted": "interrupted"}
)
"""By the last message that the executor keeps of a prompt (execution.py, add_message; 0.8 and 0.33)."""

UNFOLLOWED = "what ComfyUI executes could not be followed"

SHORT_S: Final = 0.02
"""Telling of a node costs about 10 microseconds and looking at the card for it up to 100: of a node that is over sooner than
this that would be more than 0.5 %. Most nodes of a graph only pass something on and take less than 1 ms."""

NODE_ARGUMENTS: Final = (
    "prompt_id",
    "unique_id",
    "obj",
    "input_data_all",
    "execution_block_cb",
    "pre_execute_cb",
    "v3_data",
)
"""Of get_output_data (execution.py:343 in 0.33, 328 in 0.8); ComfyUI passes the last three by name."""

PROMPT_ARGUMENTS: Final = ("self", "prompt", "prompt_id", "extra_data", "execute_outputs")
"""Of PromptExecutor.execute (execution.py:727 in 0.33)."""

Call = tuple[Any, ...] | dict[str, Any]
"""A call of get_output_data: its first arguments by position, or all by name where there are none. While it runs
no other is the same object. A NodeSpan is made of it only if somebody wants one."""

FOLLOWED: Final[Call] = ("followed",)
"""No call: it stands where one would while the nodes that run are followed one by one."""

NONE_YET: Final[Call] = ("none yet",)
"""No call: it stands where one would until a prompt's first node starts, before which ComfyUI sets up the whole graph (20 ms
for 200 nodes in 0.33: the first node would seem to take that long)."""


class PromptSpan(NamedTuple):
    """A prompt as it is handed to the executor."""

    prompt_id: str
    prompt: object
    """API format; ComfyUI's own dict, which is not to be changed."""
    outputs: list[str] | None
    """Output nodes that were asked for; None: all."""
    executor: Callable[[], Any] = lambda: None
    """The PromptExecutor that runs it, as long as there is one."""


class NodeSpan(NamedTuple):
    """One run of one node. Two runs of a node are two spans."""

    node_id: str
    class_type: str
    number: int
    """Counts spans, so that two are never equal."""
    since: float = 0.0
    """When it began, in seconds of the clock of HostExecution; of one that no other ran beside, when the one before it in its
    prompt had ended."""

    @property
    def shown_id(self) -> str:
        """The node of the graph that it belongs to: what a node expanded into has that node's id before a dot."""
        return self.node_id.split(".", 1)[0]


class PromptWatcher(Protocol):
    """Told on the worker thread: of starts in the order of their `watch`, of ends the other way round. What it raises is logged
    and costs no prompt."""

    def prompt_started(self, span: PromptSpan) -> None: ...
    def prompt_ended(self, span: PromptSpan) -> None: ...


class NodeWatcher(Protocol):
    """As PromptWatcher, of nodes. One that does nothing remarkable is not told of, and a start may be told late: when the node
    asks for models, goes on as tasks, has another one start inside it, or just before its end if it fails or takes SHORT_S."""

    def node_started(self, span: NodeSpan) -> None: ...
    def node_ended(self, span: NodeSpan, error: BaseException | None) -> None: ...


class HostExecution:
    """The running prompt and node. Read from any thread; written by the worker thread only."""

    def __init__(self, seams: SeamTable, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._prompt_id: str | None = None
        self._alone: Call | None = None
        """The node that runs, as long as nothing is remarkable about it and no other runs, as it is most of the time. FOLLOWED
        while there are others, or all are wanted; NONE_YET before the first of a prompt."""
        self._since = clock()
        """When the node that runs alone could begin: what ComfyUI does before a node counts for it, and the clock is looked at
        once for each."""
        self._spans: dict[int, NodeSpan] = {}
        """Of the calls that run, by their `id`, as far as somebody has asked for one."""
        self._numbers = itertools.count(1)
        self._woken = False
        """Something waits for a boundary and does not wait for a remarkable one."""
        self._newest: NodeSpan | None = None
        """Of `_open`."""
        self._open: dict[int, NodeSpan] = {}
        """The other nodes that run, by number, in the order they began."""
        self._told: set[int] = set()
        """Open nodes that the watchers know of."""
        self._every: set[object] = set()
        """Who has to be told of every node; mostly nobody."""
        self.outcome: RunState = "done"
        """How the prompt that ended last did, while watchers are told of its end and after."""
        self._watchers: list[PromptWatcher] = []
        self._innermost: list[PromptWatcher] = []
        self._node_started: list[Callable[[NodeSpan], None]] = []
        self._node_ended: list[Callable[[NodeSpan, BaseException | None], None]] = []
        self._boundaries: list[Callable[[], None]] = []
        seams.replace(PROMPT_SPAN, execution.PromptExecutor, "execute", self._watched_prompt)
        seams.replace(NODE_SPAN, execution, "get_output_data", self._watched_node)

    @property
    def running(self) -> Running | None:
        prompt_id, alone, newest = self._prompt_id, self._alone_now(), self._newest
        if prompt_id is None:
            return None
        return Running(prompt_id, _node_id(alone) if alone is not None else newest.node_id if newest else None)

    def is_open(self, span: NodeSpan) -> bool:
        """Whether this node still runs. Any thread."""
        # a node is followed before it stops to be alone: it is always in one of the two
        alone = self._alone_now()
        return (alone is not None and self._spans.get(id(alone)) == span) or span.number in self._open

    def long_spans(self) -> tuple[NodeSpan, ...]:
        """Nodes that run and have run for SHORT_S: watchers will be told of them, if they have not been yet. Any thread."""
        # in this order: if it ends meanwhile, another one's beginning is looked at, which is not long ago
        now, alone = self._clock(), self._alone_now()
        since = self._since
        spans = {span.number: span for span in tuple(self._open.values()) if now - span.since >= SHORT_S}
        if alone is not None and now - since >= SHORT_S:
            span = self._span(alone, since)
            if self._alone is alone or span.number in self._open:
                spans[span.number] = span
            else:
                # it has ended meanwhile; as long as we hold its arguments, no other call lies where they do
                self._spans.pop(id(alone), None)
        return tuple(spans.values())

    def open_span(self, node_id: str | None) -> NodeSpan | None:
        """The running span of this node; the newest of all where none is its. Worker thread only."""
        # whoever asks makes it remarkable: the span of one that ends unnoticed would be found for the next call in its place
        self._follow_all()
        return next((span for span in reversed(self._open.values()) if span.node_id == node_id), self._newest)

    def _alone_now(self) -> Call | None:
        alone = self._alone
        return None if alone is FOLLOWED or alone is NONE_YET else alone

    def tell(self, span: NodeSpan) -> None:
        """This node is remarkable: whoever watches is told of its start, unless that has been done. Worker thread only."""
        alone = self._alone_now()
        if alone is not None and self._spans.get(id(alone)) == span:
            self._follow_all()
        if span.number in self._told or span.number not in self._open:
            return
        self._told.add(span.number)
        for call in self._node_started:
            _guarded(call, span)

    def watch(self, watcher: PromptWatcher) -> None:
        """Tell `watcher` of every prompt from now on: of its start after those who came before it, of its end before them."""
        self._watchers.append(watcher)

    def watch_innermost(self, watcher: PromptWatcher) -> None:
        """As `watch`, but of a start after all the others, whenever they came, and of an end before them."""
        self._innermost.append(watcher)

    def watch_nodes(self, watcher: NodeWatcher) -> None:
        """Tell `watcher` of remarkable nodes from now on: of a start after those who came before it, of an end before them, so
        that what they know of the node is still there."""
        self._node_started.append(watcher.node_started)
        self._node_ended.insert(0, watcher.node_ended)

    def every_node(self, wanted_by: object, wanted: bool = True) -> None:
        """Tell of all nodes as they start, as long as somebody wants that: every node of every prompt then pays for it. Worker
        thread only."""
        (self._every.add if wanted else self._every.discard)(wanted_by)
        self._follow_all()

    def at_boundary(self, call: Callable[[], None]) -> None:
        """Call this on the worker thread whenever a remarkable node or a prompt has ended, after the watchers."""
        self._boundaries.append(call)

    def wake(self) -> None:
        """The end of the node that runs now, or of the next, is a boundary however short it is. Any thread."""
        self._woken = True

    def current_node(self) -> str | None:
        """The node whose function is running on this thread."""
        context = get_executing_context()
        return context.node_id if context else None

    def _watched_prompt(self, original: Callable[..., Any]) -> Callable[..., Any]:
        if _takes(original, PROMPT_ARGUMENTS):
            return self._prompt_as_known(original)

        def execute(*args: Any, **kwargs: Any) -> Any:
            if self._prompt_id is not None:
                return original(*args, **kwargs)
            span = prompt_span(*args, **kwargs)
            self._start_prompt(span)
            try:
                result = original(*args, **kwargs)
                self.outcome = _outcome(span.executor())
                return result
            finally:
                self._end_prompt(span)

        return execute

    def _prompt_as_known(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of an execute that takes PROMPT_ARGUMENTS: a function that calls the next with its own arguments takes none of the
        thread's C stack (Python 3.11 and later), so all that the prompt runs lies there where it would without us."""

        def execute(executor: Any, prompt: Any, prompt_id: Any, extra_data: Any, execute_outputs: Any) -> Any:
            if self._prompt_id is not None:
                # a node that runs a graph of its own: its nodes are part of the prompt that runs
                return original(executor, prompt, prompt_id, extra_data, execute_outputs)
            span = prompt_span(executor, prompt, prompt_id, extra_data, execute_outputs)
            self._start_prompt(span)
            try:
                result = original(executor, prompt, prompt_id, extra_data, execute_outputs)
                self.outcome = _outcome(executor)
                return result
            finally:
                self._end_prompt(span)

        # the very same objects, whoever changes them
        execute.__defaults__ = original.__defaults__
        return execute

    def _start_prompt(self, span: PromptSpan) -> None:
        for watcher in self._watchers:
            _guarded(watcher.prompt_started, span)
        for watcher in self._innermost:
            _guarded(watcher.prompt_started, span)
        self._prompt_id = span.prompt_id
        self.outcome = "failed"
        self._since = self._clock()
        if self._alone is None:
            self._alone = NONE_YET

    def _end_prompt(self, span: PromptSpan) -> None:
        # an async node whose prompt was stopped never says that it has ended
        self._follow_all()
        for open_span in list(self._open.values()):
            self._end(open_span, None)
        self._spans.clear()
        self._prompt_id = None
        self._newest = None
        for watcher in reversed(self._innermost):
            _guarded(watcher.prompt_ended, span)
        for watcher in reversed(self._watchers):
            _guarded(watcher.prompt_ended, span)
        self._at_boundary()

    def _watched_node(self, original: Callable[..., Any]) -> Callable[..., Any]:
        if _takes(original, NODE_ARGUMENTS):
            return self._watched_as_known(original)

        async def get_output_data(*args: Any, **kwargs: Any) -> Any:
            call = args or kwargs
            if self._alone is None:
                self._alone = call
            else:
                self._start_followed(call)
            try:
                result = await original(*args, **kwargs)
            except BaseException as error:
                self._end(self._ended(call), error)
                raise
            self._over(call, result, self._clock())
            return result

        return get_output_data

    def _watched_as_known(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of a get_output_data that takes NODE_ARGUMENTS: its own are handed on one by one, in a third fewer instructions than
        packing and unpacking whatever comes takes."""
        clock = self._clock

        async def get_output_data(
            prompt_id: Any,
            unique_id: Any,
            obj: Any,
            input_data_all: Any,
            execution_block_cb: Any = None,
            pre_execute_cb: Any = None,
            v3_data: Any = None,
        ) -> Any:
            # every node of every prompt passes here, and next to nothing may happen to a trivial one (docs/overhead.md)
            call = (prompt_id, unique_id, obj)
            if self._alone is None:
                self._alone = call
            else:
                self._start_followed(call)
            try:
                # by place, which Python calls without matching names; NODE_ARGUMENTS is their order
                result = await original(prompt_id, unique_id, obj, input_data_all, execution_block_cb, pre_execute_cb, v3_data)
            except BaseException as error:
                self._end(self._ended(call), error)
                raise
            now = clock()
            # _over, without what calling it costs
            if self._alone is call and now - self._since < SHORT_S and type(result) is tuple and not result[-1]:
                self._alone = None
                self._since = now
                if self._woken:
                    self._at_boundary()
            else:
                self._end_followed(call, result)
            return result

        return get_output_data

    def _over(self, call: Call, result: object, now: float) -> None:
        """A call has returned: nothing more happens to one that ran alone, was short and does not go on."""
        # the last value says whether the node goes on as tasks (0.8 and 0.33)
        if self._alone is call and now - self._since < SHORT_S and isinstance(result, tuple) and not result[-1]:
            self._alone = None
            self._since = now
            if self._woken:
                self._at_boundary()
        else:
            self._end_followed(call, result)

    def _start_followed(self, call: Call) -> None:
        """A call that starts while something stands for the node that runs."""
        if self._alone is NONE_YET:
            # in this order, for long_spans
            self._since = self._clock()
            self._alone = call
            return
        self._follow_all()
        for other in list(self._open.values()):
            self.tell(other)
        span = self._span(call, self._clock())
        self._open[span.number] = self._newest = span
        self._alone = FOLLOWED
        self.tell(span)

    def _span(self, call: Call, since: float) -> NodeSpan:
        """Of a call that runs; whoever asks gets the same one."""
        found = self._spans.get(id(call))
        if found is None:
            # whichever thread asks first
            found = self._spans.setdefault(id(call), NodeSpan(_node_id(call), _class_type(call), next(self._numbers), since))
        return found

    def _ended(self, call: Call) -> NodeSpan:
        """The span of a call that is over: its arguments may go, and another call's may come to lie where they were."""
        span = self._span(call, self._since)
        self._follow_all()
        self._spans.pop(id(call), None)
        return span

    def _end_followed(self, call: Call, result: object) -> None:
        span, tasks = self._ended(call), _pending(result)
        if tasks:
            self._end_with(span, tasks)
        else:
            self._end(span, None)

    def _follow_all(self) -> None:
        """The node that runs alone is one of those that are followed from now on."""
        alone = self._alone_now()
        if alone is not None:
            span = self._span(alone, self._since)
            self._open[span.number] = self._newest = span
        self._alone = FOLLOWED if self._open or self._every else None

    def _end_with(self, span: NodeSpan, tasks: list[asyncio.Task[Any]]) -> None:
        """The node has ended when its last task has; it failed if one of them did."""
        self.tell(span)
        left = set(tasks)

        def done(task: asyncio.Task[Any]) -> None:
            left.discard(task)
            if not left:
                self._end(span, next((error for one in tasks if (error := _failure(one)) is not None), None))

        for task in tasks:
            task.add_done_callback(done)

    def _end(self, span: NodeSpan, error: BaseException | None) -> None:
        self.tell(span)
        if span.number not in self._open:
            return
        del self._open[span.number]
        self._told.discard(span.number)
        for call in self._node_ended:
            _guarded(call, span, error)
        self._newest = next(reversed(self._open.values())) if self._open else None
        self._follow_all()
        self._at_boundary()
        self._since = self._clock()

    def _at_boundary(self) -> None:
        # before the calls: what comes to wait while they look is seen at the next one
        self._woken = False
        for call in self._boundaries:
            _guarded(call)


def prompt_span(*args: Any, **kwargs: Any) -> PromptSpan:
    """Of a call of PromptExecutor.execute, however it is given its arguments."""
    # the same order in every release seen
    given = dict(zip(PROMPT_ARGUMENTS, args, strict=False)) | kwargs
    outputs = given.get("execute_outputs")
    executor = _weakly(given.get("self"))
    return PromptSpan(str(given.get("prompt_id", "")), given.get("prompt"), list(outputs) if outputs else None, executor)


def _takes(function: Callable[..., Any], names: Sequence[str]) -> bool:
    """Whether `function` itself takes exactly these parameters. What a wrapper says of the function below it does not count."""
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = all(one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for one in parameters)
    return plain and [one.name for one in parameters] == list(names)


def _node_id(call: Call) -> str:
    # get_output_data(prompt_id, unique_id, obj, ...)
    return str(_argument(call, 1, "unique_id"))


def _class_type(call: Call) -> str:
    return type(_argument(call, 2, "obj")).__name__


def _argument(call: Call, place: int, name: str) -> Any:
    if isinstance(call, dict):
        return call.get(name, "")
    return call[place] if len(call) > place else ""


def _pending(result: object) -> list[asyncio.Task[Any]]:
    """Tasks of an async node that goes on: get_output_data then returns them, with True as its fourth value."""
    match result:
        case (list() as returned, _, _, True, *_):
            return [task for task in returned if isinstance(task, asyncio.Task) and not task.done()]
    return []


def _outcome(executor: object) -> RunState:
    """How the prompt that this executor ran has ended; `done` where it does not tell."""
    messages = getattr(executor, "status_messages", None)
    for message in reversed(messages) if isinstance(messages, list) else ():
        if message and message[0] in OUTCOMES:
            return OUTCOMES[message[0]]
    return "done"


def _weakly(one: object) -> Callable[[], Any]:
    try:
        return weakref.ref(one)
    except TypeError:
        return lambda: None


def _failure(task: asyncio.Task[Any]) -> BaseException | None:
    """What a task that is done raised; a cancelled one only stopped."""
    return None if task.cancelled() else task.exception()


def _guarded(call: Callable[..., None], *arguments: Any) -> None:
    """What is raised here would fail the node, or end ComfyUI's worker thread for good."""
    try:
        call(*arguments)
    except Exception:
        logger.exception(UNFOLLOWED)
