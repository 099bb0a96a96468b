"""The parts of nodes/host, on the stand-in's modules: spans of prompts and nodes, calls for the worker thread."""

from typing import Any

import pytest
from insidehost import ask_inside

SPANS = """
import asyncio, execution, types
from vram_headroom.nodes.host.execution import SHORT_S, HostExecution
from vram_headroom.nodes.host.seams import SeamTable

async def run_node(PARAMETERS):
    if keep: got.append(GOT)
    return await obj.run()
got, keep = [], []

class Executor:
    def execute(self, prompt, prompt_id, extra_data={}, execute_outputs=[]):
        return asyncio.run(prompt())

execution.get_output_data, execution.PromptExecutor = run_node, Executor
now = [0.0]
host = HostExecution(SeamTable(), lambda: now[0])
host.every_node("all of it")
told, numbers = [], []

class Watcher:
    def __init__(self, name): self.name = name
    def prompt_started(self, span): told.append([self.name, "prompt starts", span.prompt_id])
    def prompt_ended(self, span): told.append([self.name, "prompt ends", span.prompt_id])
    def node_started(self, span):
        told.append([self.name, "starts", span.node_id])
        numbers.append(span.number)
    def node_ended(self, span, error): told.append([self.name, "ends", span.node_id, type(error).__name__])

class Raises(Watcher):
    def prompt_started(self, span): raise ValueError("a watcher's own fault")
    prompt_ended = node_started = prompt_started
    def node_ended(self, span, error): raise ValueError("again")

for watcher in (Watcher("first"), Raises("broken"), Watcher("second")):
    host.watch(watcher)
    host.watch_nodes(watcher)

def node(run):
    return type("Node", (), {"run": staticmethod(run)})()

async def get(node_id, run):
    return await execution.get_output_data("p", node_id, node(run), {}, v3_data=node_id)

def run(prompt):
    told.clear()
    raised = None
    try:
        execution.PromptExecutor().execute(prompt, "p", {}, [])
    except BaseException as error:
        raised = type(error).__name__
    return {"told": [entry for entry in told if entry[0] == "first" and entry[1] in ("starts", "ends")], "all": list(told),
            "raised": raised, "running": host.running}

async def plain(): return [], {}, False, False
async def fails(): raise LookupError("no")
async def stopped(): raise KeyboardInterrupt
async def outer():
    await get("inner", plain)
    seen.append(host.running.node_id)
    return [], {}, False, False
seen = []

def tasks(*works):
    async def made():
        return [asyncio.ensure_future(work()) for work in works], {}, False, True
    return made

async def waits():
    gate = asyncio.Event()
    async def work(): await gate.wait()
    result = await get("async", tasks(work))
    told.append(["first", "starts", "meanwhile"])
    seen.append(host.running.node_id)
    gate.set()
    await asyncio.gather(*result[0])
    await asyncio.sleep(0)

async def one_of_two_fails():
    gate = asyncio.Event()
    async def bad(): raise LookupError("no")
    async def good(): await gate.wait()
    result = await get("async", tasks(bad, good))
    await asyncio.wait(result[0][:1])
    gate.set()
    await asyncio.wait(result[0])
    await asyncio.sleep(0)

async def left_alone():
    async def never(): await asyncio.Event().wait()
    await get("async", tasks(never))
    raise InterruptedError

async def nested_prompt():
    async def graph_in_a_node():
        async def inner(): await get("inside", plain)
        await asyncio.to_thread(execution.PromptExecutor().execute, inner, "other", {}, [])
        seen.append(host.running.prompt_id + host.running.node_id)
        return [], {}, False, False
    await get("runner", graph_in_a_node)

async def once(): await get("1", plain)
async def failing(): await get("1", fails)
async def stopping(): await get("1", stopped)
async def nesting(): await get("outer", outer)
found = {"plain": run(once)}
for prompt in (failing, stopping, nesting, waits, one_of_two_fails, left_alone, nested_prompt):
    seen.clear()
    found[prompt.__name__] = {**run(prompt), "seen": list(seen)}

host.every_node("all of it", False)
host.at_boundary(lambda: told.append(["first", "starts", "boundary"]))
async def slow():
    now[0] += 2 * SHORT_S
    seen.append([span.node_id for span in host.long_spans()])
    return [], {}, False, False
async def asks():
    told.append(["first", "starts", "quietly"])
    host.tell(host.open_span("1"))
    host.tell(host.open_span("1"))
    seen.append(host.is_open(host.open_span("1")))
    return [], {}, False, False
async def wakes():
    host.wake()
    return [], {}, False, False
async def waking():
    await get("1", wakes)
    await get("2", plain)
async def slowly(): await get("1", slow)
async def looked_at():
    now[0] += 2 * SHORT_S
    (span,), (again,) = host.long_spans(), host.long_spans()
    numbers.clear()
    host.tell(span)
    seen.append([span == again, numbers == [span.number] * 2, host.is_open(span), span.node_id, span.since, span.number])
    looked.append(span)
    return [], {}, False, False
async def twice():
    looked.clear()
    now[0] = 100.0
    await execution.get_output_data(prompt_id="p", unique_id="named", obj=node(looked_at), input_data_all={})
    now[0] = 200.0
    await get("1", plain)
    now[0] = 201.0
    await get("1", looked_at)
    seen.append([host.is_open(span) for span in looked])
looked = []
class EndsWhenRead:
    # the id of a node that ends while another thread makes its span
    end = None
    def __str__(self):
        end, self.end = self.end, None
        if end is not None:
            end()
        return "1"
@types.coroutine
def pause(): yield
async def waits_a_while():
    await pause()
    return [], {}, False, False
async def overtaken():
    node_id = EndsWhenRead()
    call = execution.get_output_data("p", node_id, node(waits_a_while), {})
    call.send(None)
    now[0] += 2 * SHORT_S
    def end():
        try:
            call.send(None)
        except StopIteration:
            seen.append("ended")
    node_id.end = end
    seen.append([span.node_id for span in host.long_spans()])
    seen.append(len(host._spans))
async def asking(): await get("1", asks)
for prompt in (once, waking, slowly, failing, asking, nesting, waits, twice, overtaken):
    seen.clear()
    found["quiet " + prompt.__name__] = {**run(prompt), "seen": list(seen)}
async def set_up_first():
    # what ComfyUI does before the first node, which grows with the graph
    now[0] = 301.0
    await get("1", plain)
    await get("2", plain)
async def set_up_before_a_slow_one():
    now[0] = 400.0
    seen.append(host.running.node_id)
    await get("1", looked_at)
for prompt in (set_up_first, set_up_before_a_slow_one):
    now[0] = 300.0
    seen.clear()
    found["quiet " + prompt.__name__] = {**run(prompt), "seen": list(seen)}
async def handed_on(): await get("1", plain)
keep.append(True)
run(handed_on)
found["handed on"] = got
answer(found)
"""

AS_COMFYUI = "prompt_id, unique_id, obj, input_data_all, execution_block_cb=None, pre_execute_cb=None, v3_data=None"
"""The parameters of get_output_data in 0.8 and 0.33."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((AS_COMFYUI, "[prompt_id, unique_id, input_data_all, v3_data]"), id="as ComfyUI's"),
        pytest.param(
            ("prompt_id, unique_id, obj, *rest, **named", "[prompt_id, unique_id, *rest, *named.values()]"),
            id="as another pack's wrapper",
        ),
    ],
)
def spans(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    parameters, got = request.param
    return ask_inside(SPANS.replace("PARAMETERS", parameters).replace("GOT", got), tmp_path_factory.mktemp("spans"))


def test_what_a_node_is_called_with_is_handed_on(spans: dict[str, Any]) -> None:
    assert spans["handed on"] == [["p", "1", {}, "1"]]


def steps(found: dict[str, Any]) -> list[list[str]]:
    return [entry[1:] for entry in found["told"]]


def test_a_watcher_that_raises_costs_nothing_and_ends_are_told_in_reverse(spans: dict[str, Any]) -> None:
    assert spans["plain"]["raised"] is None
    assert spans["plain"]["all"] == [
        ["first", "prompt starts", "p"],
        ["second", "prompt starts", "p"],
        ["first", "starts", "1"],
        ["second", "starts", "1"],
        ["second", "ends", "1", "NoneType"],
        ["first", "ends", "1", "NoneType"],
        ["second", "prompt ends", "p"],
        ["first", "prompt ends", "p"],
    ]


def test_a_node_that_fails_or_is_stopped_has_ended_with_its_error(spans: dict[str, Any]) -> None:
    for name, error in (("failing", "LookupError"), ("stopping", "KeyboardInterrupt")):
        assert steps(spans[name]) == [["starts", "1"], ["ends", "1", error]]
        assert spans[name]["raised"] == error
        assert spans[name]["running"] is None


def test_nodes_nest(spans: dict[str, Any]) -> None:
    told = [["starts", "outer"], ["starts", "inner"], ["ends", "inner", "NoneType"], ["ends", "outer", "NoneType"]]
    assert steps(spans["nesting"]) == told
    assert spans["nesting"]["seen"] == ["outer"], "the outer node is the running one again"


def test_an_async_node_ends_when_its_tasks_end(spans: dict[str, Any]) -> None:
    assert steps(spans["waits"]) == [["starts", "async"], ["starts", "meanwhile"], ["ends", "async", "NoneType"]]
    assert spans["waits"]["seen"] == ["async"]


def test_an_async_node_has_failed_if_one_of_its_tasks_did(spans: dict[str, Any]) -> None:
    assert steps(spans["one_of_two_fails"]) == [["starts", "async"], ["ends", "async", "LookupError"]]


def test_an_async_node_ends_at_the_latest_with_its_prompt(spans: dict[str, Any]) -> None:
    assert steps(spans["left_alone"]) == [["starts", "async"], ["ends", "async", "NoneType"]]
    assert spans["left_alone"]["raised"] == "InterruptedError"
    assert spans["left_alone"]["running"] is None


def test_whoever_looks_at_a_node_that_runs_sees_the_span_that_is_told_of(spans: dict[str, Any]) -> None:
    first, second, open_after = spans["quiet twice"]["seen"]
    assert first[:4] == [True, True, True, "named"]
    assert second[:4] == [True, True, True, "1"]
    assert first[5] != second[5], "two runs are two spans"
    assert second[4] == 200.0, "it could begin when the one before had ended"
    assert open_after == [False, False]


def test_a_node_that_ends_while_another_thread_looks_at_it_leaves_no_span_for_the_next_call(spans: dict[str, Any]) -> None:
    assert spans["quiet overtaken"]["seen"] == ["ended", [], 0]
    assert [step for step in steps(spans["quiet overtaken"]) if step[0] == "ends"] == [["ends", "1", "NoneType"]]


def test_a_graph_that_a_node_runs_is_part_of_its_prompt(spans: dict[str, Any]) -> None:
    assert [entry[2] for entry in spans["nested_prompt"]["all"] if "prompt" in entry[1]] == ["p"] * 4
    assert [step[1] for step in steps(spans["nested_prompt"])] == ["runner", "inside", "inside", "runner"]
    assert spans["nested_prompt"]["seen"] == ["prunner"]


def test_a_node_that_does_nothing_remarkable_is_not_told_of(spans: dict[str, Any]) -> None:
    assert steps(spans["quiet once"]) == [["starts", "boundary"]], "the prompt's end"
    assert spans["quiet once"]["running"] is None


def test_what_comfyui_does_before_the_first_node_does_not_count_for_it(spans: dict[str, Any]) -> None:
    assert steps(spans["quiet set_up_first"]) == [["starts", "boundary"]], "the prompt's end"
    running, looked_at = spans["quiet set_up_before_a_slow_one"]["seen"]
    assert running is None, "nothing runs yet"
    assert looked_at[4] == 400.0
    told = [["starts", "1"], ["ends", "1", "NoneType"], ["starts", "boundary"], ["starts", "boundary"]]
    assert steps(spans["quiet set_up_before_a_slow_one"]) == told


def test_its_end_is_a_boundary_all_the_same_if_something_waits_for_one(spans: dict[str, Any]) -> None:
    assert steps(spans["quiet waking"]) == [["starts", "boundary"]] * 2, "of the first node and of the prompt"


def test_a_node_is_told_of_when_it_is_slow_fails_asks_for_models_nests_or_goes_on(spans: dict[str, Any]) -> None:
    started, ended, boundary = ["starts", "1"], ["ends", "1", "NoneType"], ["starts", "boundary"]
    assert steps(spans["quiet slowly"]) == [started, ended, boundary, boundary]
    assert spans["quiet slowly"]["seen"] == [["1"]], "whoever looks meanwhile sees it"
    assert steps(spans["quiet failing"]) == [started, ["ends", "1", "LookupError"], boundary, boundary]
    assert steps(spans["quiet asking"]) == [["starts", "quietly"], started, ended, boundary, boundary], "once, when it asks"
    nested = [["starts", "outer"], ["starts", "inner"], ["ends", "inner", "NoneType"], boundary, ["ends", "outer", "NoneType"]]
    assert steps(spans["quiet nesting"]) == [*nested, boundary, boundary]
    told = [["starts", "async"], ["starts", "meanwhile"], ["ends", "async", "NoneType"]]
    assert steps(spans["quiet waits"]) == [*told, boundary, boundary]


PROMPTS = """
import execution, sys
from vram_headroom.nodes.host.execution import HostExecution
from vram_headroom.nodes.host.seams import SeamTable

def bound(self, prompt, prompt_id, extra_data={}, execute_outputs=[]):
    return self, prompt, prompt_id, extra_data, execute_outputs

class Executor:
    def execute(PARAMETERS):
        executor, prompt, prompt_id, extra_data, execute_outputs = GOT
        frame, between = sys._getframe(1), 0
        while frame.f_code.co_filename != "<string>":
            frame, between = frame.f_back, between + 1
        got.append([executor is runner, prompt, prompt_id, extra_data, execute_outputs])
        frames.append(between)
        executor.status_messages = [("execution_interrupted", {})]
        if prompt == "fails": raise LookupError("no")
        if prompt == "nests": execution.PromptExecutor.execute(executor, "inner", "n")
        return "done"

class Watcher:
    def prompt_started(self, span): told.append(["starts", *span[:3], span.executor() is runner])
    def prompt_ended(self, span): told.append(["ends", span.prompt_id, host.outcome])
class Innermost:
    def prompt_started(self, span): told.append(["innermost starts", span.prompt_id])
    def prompt_ended(self, span): told.append(["innermost ends", span.prompt_id])

execution.PromptExecutor = Executor
got, frames, told = [], [], []
runner = Executor()
defaults = Executor.execute.__defaults__
host = HostExecution(SeamTable())
host.watch_innermost(Innermost())
host.watch(Watcher())
returned = [runner.execute("a", "1", {"x": 1}, ["9"]), runner.execute(prompt="b", prompt_id="2"),
            runner.execute("c", "3", execute_outputs=[])]
one_after_another, frames_between = list(told), list(frames)
told.clear()
runner.execute("nests", "4")
nested = list(told)
try:
    runner.execute("fails", "5")
except LookupError as error:
    raised = str(error)
answer({"got": got, "returned": returned, "told": one_after_another, "nested": nested, "raised": raised,
        "frames": frames_between, "last": told[-1], "same": Executor.execute.__defaults__ is defaults})
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (
                "self, prompt, prompt_id, extra_data={}, execute_outputs=[]",
                "self, prompt, prompt_id, extra_data, execute_outputs",
            ),
            id="as in ComfyUI",
        ),
        pytest.param(
            ("*args, **kwargs", "bound(*args, **kwargs)"),
            id="as another pack's wrapper",
        ),
    ],
)
def prompts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    parameters, got = request.param
    return ask_inside(PROMPTS.replace("PARAMETERS", parameters).replace("GOT", got), tmp_path_factory.mktemp("prompts"))


def test_what_a_prompt_is_executed_with_is_handed_on(prompts: dict[str, Any]) -> None:
    """However it is given, and with the very defaults that ComfyUI has."""
    assert prompts["got"] == [
        [True, "a", "1", {"x": 1}, ["9"]],
        [True, "b", "2", {}, []],
        [True, "c", "3", {}, []],
        [True, "nests", "4", {}, []],
        [True, "inner", "n", {}, []],
        [True, "fails", "5", {}, []],
    ]
    assert prompts["returned"] == ["done"] * 3
    assert prompts["same"]


def test_a_prompts_start_and_end_are_told_with_its_outcome(prompts: dict[str, Any]) -> None:
    assert prompts["told"][:4] == [
        ["starts", "1", "a", ["9"], True],
        ["innermost starts", "1"],
        ["innermost ends", "1"],
        ["ends", "1", "interrupted"],
    ]
    assert [entry[1] for entry in prompts["told"]] == ["1"] * 4 + ["2"] * 4 + ["3"] * 4
    assert prompts["raised"] == "no"
    assert prompts["last"] == ["ends", "5", "failed"]


def test_a_prompt_within_a_prompt_is_not_told_of(prompts: dict[str, Any]) -> None:
    assert [entry[1] for entry in prompts["nested"]] == ["4"] * 4


def test_one_frame_of_ours_is_between_comfyui_and_its_own_execute(prompts: dict[str, Any]) -> None:
    """Each takes room on the stack below everything that the prompt runs."""
    assert prompts["frames"] == [1, 1, 1]


WORKER = """
import threading, weakref
from concurrent.futures import CancelledError
import comfy.model_management as model_management
from vram_headroom.nodes.controls import Control
queue, pack = server.prompt_queue, Control.pack
host, said, found = pack.host, [], {}
worker_queue = host.worker

def note(name):
    def call():
        said.append([name, threading.current_thread().name])
        return name
    return call

def fails(): raise LookupError("no")
def stops(): raise model_management.InterruptProcessingException
def submits():
    inner.append(worker_queue.submit(note("inner")))
    said.append(["outer", threading.current_thread().name])
inner = []

# nobody works yet: what is submitted waits
first, second = worker_queue.submit(note("first")), worker_queue.submit(note("second"))
failing, cancelled = worker_queue.submit(fails), worker_queue.submit(note("cancelled"))
cancelled.cancel()
outer, stopping, last = worker_queue.submit(submits), worker_queue.submit(stops), worker_queue.submit(note("last"))
found["before"] = list(said)
idle = threading.Semaphore(0)
idles = []
def at_idle():
    idles.append(queue.get_tasks_remaining())
    idle.release()
host.worker.at_idle(at_idle)
thread = threading.Thread(target=worker.work, args=(queue, server), name="worker", daemon=True)
thread.start()
found["results"] = [first.result(20), second.result(20), type(failing.exception(20)).__name__, cancelled.cancelled(),
                    outer.result(20), inner[0].result(20), type(stopping.exception(20)).__name__, last.result(20)]
found["order"] = list(said)
said.clear()
found["alive"] = thread.is_alive()
worker_queue.submit(note("while idle")).result(20)
found["idle"] = list(said)
assert queue.wait_until_idle(20)
said.clear()

# a prompt whose first node is held
class Held:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "tests"
    @classmethod
    def INPUT_TYPES(cls): return {"required": {"number": ("INT", {})}}
    def run(self, number):
        said.append([f"node {number} starts", threading.current_thread().name])
        if number == 1:
            reached.set()
            released.wait(20)
        said.append([f"node {number} ends", threading.current_thread().name])
        return ()
nodes.NODE_CLASS_MAPPINGS["Held"] = Held
reached, released = threading.Event(), threading.Event()
class Prompt(dict): pass
prompts = []
def put(number, prompt_id, first):
    prompt = Prompt({str(i): {"class_type": "Held", "inputs": {"number": i}} for i in (first, first + 1)})
    prompts.append(weakref.ref(prompt))
    queue.put((number, prompt_id, prompt, {}, list(prompt), {}))
idles.clear()
put(1, "a", 1)
put(2, "b", 3)
assert reached.wait(20)
between = worker_queue.submit(note("between"))
found["waits"] = not between.done()
released.set()
between.result(20)
assert queue.wait_until_idle(20)
found["boundary"] = [entry[0] for entry in said]
found["idles"] = list(idles)
queue.history.clear()
found["there"] = [one() is not None for one in prompts]

# ComfyUI's own wait does not look at its flags first: one that is set while the worker is busy wakes nobody
class AsComfyUI(type(queue)):
    def get(self, timeout=None):
        return worker_queue._around_get(self.wait, self, timeout=timeout)
    def wait(self, queue, timeout=None):
        with self.not_empty:
            while not self.queue:
                waits.set()
                self.not_empty.wait(timeout=timeout)
                if not self.queue:
                    return None

waits, came = threading.Event(), threading.Event()
late = []
def submits_late():
    if not late:
        late.append(worker_queue.submit(note("late")))
        came.set()
server.prompt_queue = AsComfyUI(server)
worker_queue.at_idle(submits_late)
threading.Thread(target=worker.work, args=(server.prompt_queue, server), name="worker", daemon=True).start()
assert waits.wait(20)
server.prompt_queue.set_flag("anything", True)
assert came.wait(20)
found["late"] = late[0].result(20)
answer(found)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask_inside(WORKER, tmp_path_factory.mktemp("worker"), served=True)


def test_calls_run_in_order_on_the_worker_and_hand_back_what_came_of_them(worker: dict[str, Any]) -> None:
    assert worker["before"] == []
    said = ["first", "second", "LookupError", True, None, "inner", "InterruptProcessingException", "last"]
    assert worker["results"] == said
    assert worker["order"] == [[name, "worker"] for name in ("first", "second", "outer", "last", "inner")]


def test_an_interrupt_between_prompts_does_not_end_comfyuis_worker(worker: dict[str, Any]) -> None:
    assert worker["alive"] is True


def test_a_call_made_while_nothing_runs_is_done_by_the_queues_own_flags(worker: dict[str, Any]) -> None:
    assert worker["idle"] == [["while idle", "worker"]]


def test_a_call_made_while_a_prompt_runs_waits_for_the_end_of_the_node(worker: dict[str, Any]) -> None:
    assert worker["waits"] is True
    assert worker["boundary"][:3] == ["node 1 starts", "node 1 ends", "between"]
    assert worker["boundary"][3:] == [f"node {number} {what}" for number in (2, 3, 4) for what in ("starts", "ends")]


def test_idle_is_told_only_when_nothing_waits(worker: dict[str, Any]) -> None:
    assert worker["idles"] == [0], "once, and not between the two prompts"


def test_of_prompts_that_history_has_forgotten_only_the_last_is_kept_when_idle(worker: dict[str, Any]) -> None:
    assert worker["there"] == [False, True]


def test_a_call_made_while_the_worker_is_busy_between_prompts_is_not_slept_through(worker: dict[str, Any]) -> None:
    assert worker["late"] == "late"


NODE_CACHE = """
import execution, types, weakref
from vram_headroom.nodes.host.execution import HostExecution
from vram_headroom.nodes.host.node_cache import HostNodeCache
from vram_headroom.nodes.host.seams import SeamTable

class Prompt(dict): pass

def kept():
    found = cache.kept()
    return found and [found.run, sorted(found.nodes)]

class Executor:
    def __init__(self):
        keys = types.SimpleNamespace(get_data_key=lambda node_id: node_id)
        self.caches = types.SimpleNamespace(outputs=types.SimpleNamespace(cache_key_set=keys, cache={"1": "its output"}))
    def execute(self, prompt, prompt_id, extra_data={}, execute_outputs=[]):
        there.append([one() is not None for one in prompts])
        said.append(kept())
        if prompt_id == "outer":
            self.execute(Prompt(prompt), "inner")
            said.append(kept())

execution.PromptExecutor = Executor
seams = SeamTable()
cache = HostNodeCache(seams, HostExecution(seams))
executor, prompts, there, said = Executor(), [], [], []

def run(prompt_id):
    prompt = Prompt({"1": {}, "2": {}})
    prompts.append(weakref.ref(prompt))
    executor.execute(prompt, prompt_id)
    said.append(kept())

run("a")
run("b")
run("c")
cache.tidy()
run("d")
freed = list(there)
said.clear()
run("e")
run("outer")
answer({"there": freed, "said": said})
"""


@pytest.fixture(scope="module")
def node_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask_inside(NODE_CACHE, tmp_path_factory.mktemp("node_cache"))


def test_the_last_prompt_is_not_freed_in_the_time_of_the_next_one_and_no_other_is_kept(node_cache: dict[str, Any]) -> None:
    """ComfyUI's history may have been cleared: then ours is the last hold on its thousand objects."""
    assert node_cache["there"] == [[True], [True, True], [True, True, True], [False, False, True, True]]


def test_what_the_last_run_left_is_not_told_while_one_runs(node_cache: dict[str, Any]) -> None:
    """Nor once a graph that a node runs has ended: the prompt around it has not."""
    assert node_cache["said"] == [None, ["e", ["1"]], None, None, None, ["outer", ["1"]]]
