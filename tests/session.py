"""A person at the canvas: one page of ComfyUI's front end, with our bar and our question on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host.record.record_prompts import SHOWN
from playwright.sync_api import Browser, Locator, Page, Response, Route, ViewportSize, expect

ARTIFACTS = Path(__file__).parent / "artifacts"
BAR = "#vram-headroom-bar"
QUESTION = "dialog#vram-headroom-question"
CHECK = "**/api/v1/hardware/vram/check"
STATUS = "**/api/v1/hardware/vram"
PROMPT = "**/api/prompt"
QUEUED = {"prompt_id": "0f5c2f5e-0000-4000-8000-000000000000", "number": 1, "node_errors": {}}

READY = """() => {
    const app = window.comfyAPI?.app?.app;
    return (app?.rootGraph ?? app?.graph)?.nodes?.length > 0;
}"""
"""Some graph is on the canvas: the front end's own, where none was asked for."""

OPEN = """async (name) => {
    const answer = await fetch(`/templates/${name}.json`);
    await window.comfyAPI.app.app.loadGraphData(await answer.json(), true, true, name);
}"""
"""Opens an official workflow as front ends before 1.30 can, which do not know the address' parameter."""

QUEUE = """([count, trigger]) => {
    const options = trigger ? { intent: { trigger_source: trigger } } : undefined;
    window.pressed = window.comfyAPI.app.app.queuePrompt(0, count, options);
}"""

SETTLED = "() => window.pressed.then(() => true)"
"""The front end is through with the last press. Its banner says less: banners of earlier presses stand in line, 4 s each."""

WIDGETS = """() => {
    const app = window.comfyAPI.app.app;
    const found = {};
    const walk = (graph, prefix) => {
        for (const node of graph.nodes) {
            found[`${prefix}${node.id}`] = node.type;
            for (const widget of node.widgets ?? []) {
                if (!widget.name.startsWith("$$")) found[`${prefix}${node.id}.${widget.name}`] = widget.value;
            }
            if (node.subgraph) walk(node.subgraph, `${prefix}${node.id}:`);
        }
    };
    walk(app.rootGraph ?? app.graph, "");
    return found;
}"""
"""Every node's class and every widget's value, in subgraphs too; previews, whose names begin with $$, left out."""


CLEAN = """async () => {
    document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close("cancel"));
    localStorage.removeItem("VRAMHeadroom.DoNotAsk");
    const { setting, toast } = window.comfyAPI.app.app.extensionManager;
    for (const [id, value] of Object.entries(%s)) if (setting.get(id) !== value) await setting.set(id, value);
    (toast.dismissAll ?? toast.removeAllGroups)?.call(toast);
}""" % json.dumps(  # noqa: UP031 - braces are JavaScript's
    {
        "VRAMHeadroom.ShowBar": True,
        "VRAMHeadroom.BarShows": "pressure",
        "VRAMHeadroom.BarCard": "fullest",
        "VRAMHeadroom.WarnAtPercent": 90,
        "VRAMHeadroom.PollSeconds": 3,
        "VRAMHeadroom.AskBeforeQueueing": "warn",
        "VRAMHeadroom.NodeBadges": False,
        "Comfy.UseNewMenu": "Top",
        "Comfy.ColorPalette": "dark",
    }
)

SIZE: ViewportSize = {"width": 1400, "height": 860}


class Session:
    """One page on one host or real ComfyUI, and how many prompts it posted."""

    def __init__(self, url: str, browser: Browser, wait_for_graph: str = SHOWN, template: str = "") -> None:
        """`template`: the official workflow to open, where the host opens none by itself."""
        self.page: Page = browser.new_page(viewport=SIZE)
        self.posted = 0
        self.checks = 0
        self.served = 0
        """Readings that a test has put in place of the host's (panels.py)."""
        self._fresh: dict[str, dict[str, Any]] = {}
        self.page.on("response", self._note)
        self.page.goto(url)
        self.page.wait_for_function(READY if template else wait_for_graph)
        if template:
            self.open(template)
        expect(self.page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)

    def open(self, template: str) -> None:
        """Put an official workflow on the canvas."""
        self.page.evaluate(OPEN, template)
        self.page.wait_for_function(SHOWN)
        self._fresh[template] = _without_seeds(self.widgets())

    def begin(self, template: str) -> None:
        """A new test on this page; a graph that is still as it came is not opened again."""
        self.posted = self.checks = 0
        if _without_seeds(self.widgets()) != self._fresh.get(template):
            self.open(template)

    def swallow_prompts(self) -> None:
        """Posted prompts are answered as ComfyUI does, and never run: one that runs out of memory opens a dialog of its own."""

        def answer(route: Route) -> None:
            if route.request.method == "POST":
                route.fulfill(json=QUEUED)
            else:
                route.continue_()

        self.page.route(PROMPT, answer)

    def let_prompts_run(self) -> None:
        self.page.unroute(PROMPT)

    def reload(self) -> None:
        """The page as it is when it is opened anew; nothing that was under way on it goes on."""
        self.page.reload()
        self.page.wait_for_function(READY)
        expect(self.page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)

    def end(self) -> None:
        """Takes back what a test may have left on this page."""
        self.page.unroute_all(behavior="ignoreErrors")
        self.page.evaluate(CLEAN)
        self.page.set_viewport_size(SIZE)

    def _note(self, response: Response) -> None:
        if response.request.method != "POST":
            return
        if response.url.endswith("/api/prompt") and response.status == 200:
            self.posted += 1
        # the question asks a second time, for what would help; badges ask on their own account
        asked = response.request.post_data_json if response.url.endswith("/vram/check") else None
        if asked and asked.get("fixes") is False and "asked_for" not in asked:
            self.checks += 1

    def run(self) -> None:
        self.page.get_by_test_id("queue-button").first.click()

    def queue(self, count: int = 1, trigger: str | None = None) -> None:
        """As pressing Run does, without waiting for what comes of it."""
        self.page.evaluate(QUEUE, [count, trigger])

    def wait_until_settled(self) -> None:
        """Until the front end is through with every prompt of the last `queue`, posted or not."""
        self.page.wait_for_function(SETTLED, timeout=20_000)

    def widgets(self) -> dict[str, Any]:
        return self.page.evaluate(WIDGETS)

    def set_setting(self, name: str, value: object) -> None:
        self.page.evaluate("([id, value]) => window.comfyAPI.app.app.extensionManager.setting.set(id, value)", [name, value])

    @property
    def question(self) -> Locator:
        return self.page.locator(QUESTION)

    def choose(self, button: str) -> None:
        """Press a button of the question, and wait until it is gone."""
        self.question.get_by_role("button", name=button, exact=True).click()
        expect(self.question).to_be_hidden()

    def bar(self, name: str) -> str | None:
        return self.page.locator(BAR).get_attribute(f"data-{name}")

    def used(self) -> int:
        return int(self.bar("used-bytes") or 0)

    def toast(self, text: str) -> Locator:
        return self.page.get_by_role("listitem").or_(self.page.get_by_role("alert")).filter(has_text=text).first

    def shot(self, name: str) -> None:
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png")

    def await_bar(self, **shown: object) -> None:
        """Until the bar shows these values."""
        for name, value in shown.items():
            expect(self.page.locator(BAR)).to_have_attribute(f"data-{name.replace('_', '-')}", str(value), timeout=20_000)

    def press(self, click: Callable[[], None]) -> str:
        """Click something that queues; the id of the prompt that was posted."""
        with self.page.expect_response(lambda response: response.url.endswith("/api/prompt")) as posted:
            click()
        assert posted.value.status == 200, posted.value.text()
        return posted.value.json()["prompt_id"]


def _without_seeds(widgets: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in widgets.items() if "seed" not in name}
