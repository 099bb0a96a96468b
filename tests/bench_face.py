"""What the bar costs the browser: performance traces of ComfyUI's page with the pack and without it, in pairs.

usage, in the repository's root: python tests/bench_face.py [--seconds 60] [--pairs 2] [--write docs/idle-cost.md]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chromium import ARGUMENTS, BROWSERS
from host.process import HostProcess, start_host
from session import BAR, OPEN, READY

GIB: Final = 1 << 30
TEMPLATE: Final = "text_to_video_wan"
DRAWING: Final = ("Layout", "UpdateLayoutTree", "Paint")
CATEGORIES: Final = ["devtools.timeline", "toplevel"]
SETTLE_S: Final = 8.0
"""Until what the start does is done."""

LOOK: Final = """setInterval(() => document.dispatchEvent(new Event("visibilitychange")), 500)"""
"""Makes the pack look at the card as often as it ever does; without the pack the same event is sent."""


class Cost(NamedTuple):
    """Of one trace."""

    seconds: float
    layouts: int
    style_recalculations: int
    paints: int
    busy_ms: float
    """CPU time of the renderer's main thread: what else the machine does is not counted."""


def read_trace(events: list[Mapping[str, Any]], seconds: float) -> Cost:
    """Count what Chromium's trace says of the page's main thread."""
    mains = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and e["args"].get("name") == "CrRendererMain"}
    drawn = dict.fromkeys(DRAWING, 0)
    busy: dict[tuple[int, int], float] = {}
    for event in events:
        thread = (event["pid"], event["tid"])
        if thread not in mains:
            continue
        if event["name"] in drawn and event["ph"] in ("X", "B"):
            drawn[event["name"]] += 1
        if event["name"].endswith("RunTask") and event["ph"] == "X":
            busy[thread] = busy.get(thread, 0.0) + event.get("tdur", 0) / 1000
    return Cost(seconds, drawn["Layout"], drawn["UpdateLayoutTree"], drawn["Paint"], max(busy.values(), default=0.0))


class Browser:
    """Chromium over its own protocol and nothing more: Playwright watches every request, and that would be measured too."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._traced: list[Mapping[str, Any]] = []
        self._complete = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def send(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(
            {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        )
        return await answer

    async def evaluate(self, session: str, script: str) -> Any:
        found = await self.send("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)
        return found["result"].get("value")

    async def until(self, session: str, script: str) -> None:
        while not await self.evaluate(session, script):
            await asyncio.sleep(0.25)

    async def trace(self, seconds: float) -> list[Mapping[str, Any]]:
        self._traced.clear()
        self._complete.clear()
        await self.send("Tracing.start", traceConfig={"includedCategories": CATEGORIES}, transferMode="ReportEvents")
        await asyncio.sleep(seconds)
        await self.send("Tracing.end")
        await self._complete.wait()
        return list(self._traced)

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if told.get("method") == "Tracing.dataCollected":
                self._traced.extend(told["params"]["value"])
            elif told.get("method") == "Tracing.tracingComplete":
                self._complete.set()
            elif "id" in told:
                self._answers.pop(told["id"]).set_result(told.get("result", {}))


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Browser]:
    path = next(found for name in BROWSERS if (found := shutil.which(name)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [path, *ARGUMENTS, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        process = subprocess.Popen([*command, "--window-size=1400,860"], stderr=subprocess.DEVNULL)
        try:
            where = Path(folder, "DevToolsActivePort")
            while not where.exists() or "\n" not in where.read_text():
                await asyncio.sleep(0.1)
            port, address = where.read_text().split("\n")[:2]
            url = f"ws://127.0.0.1:{port}{address}"
            async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=0) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait()


async def measure(host: HostProcess, seconds: float, pack: bool, changing: bool) -> Cost:
    """One page in a browser of its own, at rest for so long."""
    async with started() as browser:
        target = (await browser.send("Target.createTarget", url=host.url))["targetId"]
        session = (await browser.send("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        await browser.until(session, f"({READY})()")
        await browser.evaluate(session, f"({OPEN})({json.dumps(TEMPLATE)})")
        if pack:
            await browser.until(session, f"document.querySelector('{BAR}[data-state=ok]') !== null")
        change = asyncio.create_task(change_twice_a_second(host)) if changing else None
        if changing:
            await browser.evaluate(session, LOOK)
        await asyncio.sleep(SETTLE_S)
        events = await browser.trace(seconds)
        if change is not None:
            change.cancel()
        return read_trace(events, seconds)


async def change_twice_a_second(host: HostProcess) -> None:
    """Other programs come and go on the card, so that every figure is new at every reading, within one band."""
    for count in itertools.count(1):
        held = (10 + count * 17 % 45) * 16 * GIB // 100
        await asyncio.to_thread(host.post, "/_host/others", {"bytes": held})
        await asyncio.sleep(0.5)


async def version_of_browser() -> str:
    async with started() as browser:
        return (await browser.send("Browser.getVersion"))["product"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    found: dict[tuple[bool, bool], list[Cost]] = {}
    for pair in range(options.pairs):
        for changing in (False, True):
            # whoever comes second finds a warmer machine
            for pack in (False, True) if pair % 2 == 0 else (True, False):
                with start_host(template="", pack=pack) as host:
                    cost = asyncio.run(measure(host, options.seconds, pack, changing))
                found.setdefault((changing, pack), []).append(cost)
                sys.stdout.write(f"{'changing' if changing else 'steady'}, pack {'on' if pack else 'off'}: {cost}\n")
                sys.stdout.flush()
    version = asyncio.run(version_of_browser())
    text = table(found, options.seconds, version)
    sys.stdout.write(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


def table(found: Mapping[tuple[bool, bool], list[Cost]], seconds: float, version: str) -> str:
    """The page docs/idle-cost.md."""
    lines = [
        "# What the bar costs the browser\n",
        f"{version}, front end 1.58.1 with the official {TEMPLATE} workflow on its canvas, {seconds:g} s a trace, "
        f"{len(found[False, False])} pairs, medians of Chromium's own performance trace. Made by `python tests/bench_face.py "
        "--write docs/idle-cost.md`.\n",
        "| card | pack | layouts | style recalculations | paints | main thread busy |",
        "|---|---|---|---|---|---|",
    ]
    for (changing, pack), costs in sorted(found.items()):
        layouts, styles, paints, busy = (
            statistics.median(getattr(cost, name) for cost in costs)
            for name in ("layouts", "style_recalculations", "paints", "busy_ms")
        )
        what = "changes twice a second" if changing else "steady"
        share = f"{busy / seconds / 10:.2f} %"
        lines.append(f"| {what} | {'on' if pack else 'off'} | {layouts:g} | {styles:g} | {paints:g} | {share} |")
    for changing in (False, True):
        pairs = zip(found[changing, False], found[changing, True], strict=True)
        extra = [(on.busy_ms - off.busy_ms) / seconds / 10 for off, on in pairs]
        what = "that changes twice a second" if changing else "at rest"
        lines.append(
            f"\nA card {what}: {statistics.median(extra):+.2f} % of the main thread "
            f"({', '.join(f'{one:+.2f}' for one in extra)} in the pairs)."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
