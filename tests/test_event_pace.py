"""How often watchers are told, and when they are forgotten, by a clock of the test's own. On the stand-in's modules."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from insidehost import ask_inside

PACE = """
import threading
from types import SimpleNamespace
from standin.card import card
import vram_headroom.nodes.pack as packs
from vram_headroom.nodes.controls import Control
from vram_headroom.nodes.events import Events
from vram_headroom.nodes.host.execution import PromptSpan
from vram_headroom.vram.incidents import Incident

pack, lifecycle = Control.pack, Control.lifecycle
now, sent, found = [1000.0], [], {}
MIB = 1 << 20
def send_sync(event, data, sid=None):
    sent.append([round(now[0], 3), event.removeprefix("vram_headroom."), sid, data])
server.send_sync = send_sync
submitted = []
thread = SimpleNamespace(submit=submitted.append)
events = Events(pack, lifecycle, clock=lambda: now[0], thread=thread)

def told(since=0):
    return [entry[:3] for entry in sent[since:]]

def pass_time(seconds, change=lambda step: None):
    for step in range(round(seconds * 100)):
        now[0] += 0.01
        change(step)
        events.changed()
        events.tell()

def others(mib):
    card().set_others(mib * MIB)

# what other programs do to system memory is no part of this, nor is the self-check
packs.read_system_memory = lambda: None
pack.status()
pack.host.checker.finish()

# nobody watches
pass_time(3, lambda step: others(10 * step))
found["nobody"] = [told(), len(submitted), events.watching()]

# one watches, nothing changes; then a hundred changes a second; then nothing again
events.watch("a")
found["threads"] = len(submitted)
pass_time(3)
found["steady"] = told()
pass_time(5, lambda step: (others(10 * step + 10), events.watch("a") if step % 100 == 0 else None))
found["storm"] = told()
last = sent[-1][3]["devices"][0]["used_bytes"]
pass_time(1)
found["after the storm"] = [told()[len(found["storm"]):], sent[-1][3]["devices"][0]["used_bytes"] // MIB, last // MIB]

# two watch and are told alone
before = len(sent)
events.watch("b")
others(4000)
pass_time(0.6)
found["two"] = [entry[1:] for entry in told(before)]

# one of them is not heard of any more
before, since = len(sent), now[0]
for second in range(40):
    others(second * 10)
    events.watch("b")
    pass_time(1)
found["vanished"] = [events.watching(), max(entry[0] - since for entry in told(before) if entry[2] == "a")]
events.leave("b")
before = len(sent)
others(77)
pass_time(2)
found["left"] = [told(before), events.watching()]

# what a page was told by an answer is no event, and what changes back after it is one
events.watch("c")
before = len(sent)
others(500)
said = events.watch("c").status
others(77)
pass_time(2)
def used(report):
    return report["devices"][0]["used_bytes"] // MIB
found["back"] = [used(said), [used(entry[3]) for entry in sent[before:]]]

# a run: samples a hundred times a second, an incident, the end, and the next run at once
def span(prompt_id):
    return PromptSpan(prompt_id, {}, None)

before, ticks = len(sent), []
host = pack.host.execution
for watcher in host._watchers:
    watcher.prompt_started(span("p"))
incident = Incident("p", "8", "retry", 1, pack.monitor.now(), 5, True, "once more")
def sample(step):
    lifecycle.record.sample(step)
    if step == 150:
        pack.incidents.record(incident)
        ticks.append(round(now[0], 3))
pass_time(3, sample)
phases = [entry for entry in sent[before:] if entry[1] == "phase"]
found["run"] = {
    "at": [entry[0] for entry in phases],
    "states": sorted({entry[3]["state"] for entry in phases}),
    "samples": sum(len(entry[3]["samples"]) for entry in phases),
    "plans": [entry[3] for entry in sent[before:] if entry[1] == "plan"],
    "recoveries": [[entry[0], entry[3]] for entry in sent[before:] if entry[1] == "recovery"],
    "recorded": ticks,
}
for watcher in reversed(host._watchers):
    watcher.prompt_ended(span("p"))
for watcher in host._watchers:
    watcher.prompt_started(span("q"))
lifecycle.record.sample(7)
before = len(sent)
pass_time(2)
found["ends"] = [[entry[3]["prompt_id"], entry[3]["state"]] for entry in sent[before:] if entry[1] == "phase"]
for watcher in reversed(host._watchers):
    watcher.prompt_ended(span("q"))
pass_time(2)
before = len(sent)
pass_time(5)
found["quiet"] = told(before)
run = events.watch("late").run
found["late"] = [run["prompt_id"], run["state"], run["samples"] and run["samples"][0][1], run["recoveries"]]
before = len(sent)
pass_time(3)
found["late is told nothing twice"] = told(before)
found["recovered"] = [one["kind"] for one in events._reports.run(lifecycle.record.before()).report["recoveries"]]

# the real thread: there while somebody watches, gone with the last
gate, waiting = threading.Semaphore(0), threading.Semaphore(0)
def wait(event, seconds):
    waiting.release()
    return gate.acquire(timeout=20)
real = Events(pack, lifecycle, clock=lambda: now[0], wait=wait)
def names():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vram_headroom")]
found["no thread"] = names()
real.watch("x")
real.watch("y")
waiting.acquire(timeout=20)
found["one thread"] = names()
(thread,) = [thread for thread in threading.enumerate() if thread.name == "vram_headroom_events"]
real.leave("x")
gate.release()
waiting.acquire(timeout=20)
found["still one"] = names()
now[0] += 31.0
gate.release()
thread.join(20)
found["none again"] = [names(), real.watching()]
answer(found)
"""


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base: Path = tmp_path_factory.mktemp("pace")
    return ask_inside(PACE, base, served=True)


def test_nobody_watches_and_nothing_is_sent_or_started(pace: dict[str, Any]) -> None:
    assert pace["nobody"] == [[], 0, []]


def test_what_does_not_change_is_not_told(pace: dict[str, Any]) -> None:
    assert pace["threads"] == 1
    assert pace["steady"] == []


def test_a_hundred_changes_a_second_are_told_twice_and_the_last_one_is(pace: dict[str, Any]) -> None:
    times = [at for at, _, _ in pace["storm"]]
    assert {(event, client) for _, event, client in pace["storm"]} == {("status", "a")}
    assert len(times) == 10, "five seconds"
    assert all(later - earlier >= 0.5 - 1e-6 for earlier, later in pairwise(times))
    trailing, told, before = pace["after the storm"]
    assert len(trailing) == 1
    assert (told, before) == (5000, before)
    assert before < 5000


def test_each_watcher_is_told_and_nobody_else(pace: dict[str, Any]) -> None:
    assert sorted(pace["two"]) == [["status", "a"], ["status", "b"]]


def test_a_client_that_vanishes_is_forgotten_after_half_a_minute(pace: dict[str, Any]) -> None:
    watching, last = pace["vanished"]
    assert watching == ["b"]
    assert 20 < last <= 30.5
    assert pace["left"] == [[], []]


def test_what_changes_back_after_an_answer_is_told(pace: dict[str, Any]) -> None:
    assert pace["back"] == [500, [77]]


def test_a_run_is_told_twice_a_second_with_every_sample_once_and_a_recovery_at_once(pace: dict[str, Any]) -> None:
    run = pace["run"]
    assert all(later - earlier >= 0.5 - 1e-6 for earlier, later in pairwise(run["at"]))
    assert len(run["at"]) == 6
    assert run["states"] == ["running"]
    assert run["samples"] >= 250
    assert run["plans"] == [{"prompt_id": "p", "plan": None}], "an empty prompt can't be planned"
    ((at, recovery),) = run["recoveries"]
    assert [at] == run["recorded"]
    assert (recovery["kind"], recovery["freed_bytes"], recovery["file"], recovery["node_id"]) == ("retry", 5, None, "8")
    assert set(recovery) == {
        *("prompt_id", "node_id", "kind", "attempt", "at", "freed_bytes", "same_picture", "file", "message"),
    }


def test_the_end_of_a_run_is_told_although_the_next_one_starts_at_once(pace: dict[str, Any]) -> None:
    assert pace["ends"] == [["p", "done"], ["q", "running"]]


def test_the_last_run_stays_and_is_told_once(pace: dict[str, Any]) -> None:
    assert pace["quiet"] == []
    assert pace["late"] == ["q", "done", 7, []]
    assert pace["late is told nothing twice"] == []
    assert pace["recovered"] == ["retry"]


def test_one_thread_for_all_watchers_and_none_after_the_last(pace: dict[str, Any]) -> None:
    assert pace["no thread"] == []
    assert pace["one thread"] == pace["still one"] == ["vram_headroom_events"]
    assert pace["none again"] == [[], []]
