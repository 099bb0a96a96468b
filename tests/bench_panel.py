"""What opening and scrolling the panel costs with 50 models, by Chromium's own performance trace.

usage, in the repository's root: python tests/bench_panel.py [--times 10] [--write docs/panel-cost.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chromium import chromium
from host.process import start_host
from panels import PANEL, TAB, busy, close_panel, component, play, serve, status
from playwright.sync_api import Browser, Page
from session import Session

MODELS: Final = 50
LONG_MS: Final = 50.0
"""From here on a task is a long one (W3C Long Tasks)."""

OPEN: Final = """async ([id, selector]) => {
    performance.mark("opening");
    const started = performance.now();
    window.comfyAPI.app.app.extensionManager.sidebarTab.toggleSidebarTab(id);
    while (!document.querySelector(selector)) await new Promise((resolve) => requestAnimationFrame(resolve));
    document.querySelector(selector).getBoundingClientRect();
    const there = performance.now();
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)));
    performance.mark("opened");
    return [there - started, performance.now() - started];
}"""
"""Milliseconds until the panel is laid out in the page, and until it has been painted."""

BARE: Final = """([id]) => window.comfyAPI.app.app.extensionManager.registerSidebarTab({
    id, icon: "pi pi-circle", title: "bare", tooltip: "bare", type: "custom", destroy() {},
    render(element) { element.innerHTML = "<p id=bare>bare</p>"; },
})"""
"""A tab with one line of text: what opening any tab costs the front end."""

SCROLL: Final = """async (selector) => {
    let at = document.querySelector(selector);
    while (at.scrollHeight <= at.clientHeight || getComputedStyle(at).overflowY === "visible") at = at.parentElement;
    performance.mark("scrolling");
    const most = at.scrollHeight - at.clientHeight;
    for (let i = 0; i <= 120; i++) {
        at.scrollTop = most * (i <= 60 ? i / 60 : (120 - i) / 60);
        await new Promise((resolve) => requestAnimationFrame(resolve));
    }
    performance.mark("scrolled");
    return most;
}"""
"""Down and up again in 120 frames; returns the pixels that there are to scroll."""


class Task(NamedTuple):
    """One task of the page's main thread, in milliseconds since the first mark."""

    at: float
    wall: float
    cpu: float


class Cost(NamedTuple):
    there: float
    painted: float
    opening: list[Task]
    scrolling: list[Task]


def tasks(events: list[Mapping[str, Any]], begin: str, end: str) -> list[Task]:
    """Those of the main thread between two marks."""
    marks = {e["name"]: e for e in events if e["name"] in (begin, end) and "blink.user_timing" in e["cat"]}
    first, last = marks[begin], marks[end]
    thread = (first["pid"], first["tid"])
    found = [
        Task((e["ts"] - first["ts"]) / 1000, e.get("dur", 0) / 1000, e.get("tdur", 0) / 1000)
        for e in events
        if e["name"].endswith("RunTask") and e["ph"] == "X" and (e["pid"], e["tid"]) == thread
    ]
    return [task for task in found if task.at + task.wall > 0 and task.at < (last["ts"] - first["ts"]) / 1000]


def measure(browser: Browser, page: Page) -> Cost:
    browser.start_tracing(page=page, categories=["devtools.timeline", "toplevel", "blink.user_timing"])
    there, painted = page.evaluate(OPEN, [TAB, PANEL])
    scrolled = page.evaluate(SCROLL, PANEL)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    assert scrolled > 2000, scrolled
    return Cost(there, painted, tasks(events, "opening", "opened"), tasks(events, "scrolling", "scrolled"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with start_host(template="") as host, chromium() as browser:
        host.post("/api/settings/VRAMHeadroom.NodeBadges", False)
        session = Session(host.url, browser, template="text_to_video_wan")
        parts = [component(100 + i, f"model {i}", "generator", 1 + i / 10, 0.1, in_use=i % 5 == 0) for i in range(MODELS)]
        serve(session, status(busy(), pipelines=[{"name": "many", "state": "idle", "components": parts}]))
        play(session, 5, "done")
        bare = bare_tab(session.page, options.times)
        costs = []
        for _ in range(options.times + 1):
            costs.append(measure(browser, session.page))
            close_panel(session)
        version = browser.version
    text = told(costs[1:], bare[1:], version)
    sys.stdout.write(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
        worst = max(costs[1:], key=lambda cost: max(task.wall for task in cost.scrolling))
        trace = {
            name: [[round(value, 2) for value in task] for task in getattr(worst, name)] for name in ("opening", "scrolling")
        }
        text = json.dumps({"columns": ["at_ms", "wall_ms", "cpu_ms"], **trace})
        options.write.with_suffix(".trace.json").write_text(text + "\n", encoding="utf-8")


def bare_tab(page: Page, times: int) -> list[float]:
    page.evaluate(BARE, ["bare-tab"])
    found = []
    for _ in range(times + 1):
        found.append(page.evaluate(OPEN, ["bare-tab", "#bare"])[1])
        page.evaluate("(id) => window.comfyAPI.app.app.extensionManager.sidebarTab.toggleSidebarTab(id)", "bare-tab")
        page.wait_for_function("() => !document.querySelector('#bare')")
    return found


def told(costs: list[Cost], bare: list[float], version: str) -> str:
    """The page docs/panel-cost.md."""
    longest = [max((task.wall for task in cost.scrolling), default=0.0) for cost in costs]
    longest_cpu = [max((task.cpu for task in cost.scrolling), default=0.0) for cost in costs]
    over = sum(task.wall > LONG_MS for cost in costs for task in cost.scrolling)
    rows = [
        ("the panel is laid out in the page, ms", [cost.there for cost in costs]),
        ("it has been painted, ms", [cost.painted for cost in costs]),
        ("a tab with one line of text has been painted, ms", bare),
        ("the longest task while it scrolls, ms", longest),
        ("the same, on the processor, ms", longest_cpu),
    ]
    lines = [
        "# What the panel costs with 50 models\n",
        f"Chromium {version}, front end 1.58.1 with an official workflow on its canvas, a pipeline of {MODELS} models and a "
        f"finished run in the panel; opened and scrolled to its end and back in 120 frames, {len(costs)} times after one that "
        "is left out. Made by `python tests/bench_panel.py --write docs/panel-cost.md`; beside it lies every task of the main "
        'thread in the worst of these traces. "On the processor" leaves out what else a shared machine does.\n',
        "| until | median | most |",
        "|---|---|---|",
        *(f"| {name} | {statistics.median(values):.0f} | {max(values):.0f} |" for name, values in rows),
        f"\nTasks over {LONG_MS:g} ms while it scrolls: {over}, of {sum(len(cost.scrolling) for cost in costs)}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
