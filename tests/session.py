"""A person at the canvas: one page of ComfyUI's front end, with our bar and our question on it."""

from collections.abc import Callable
from pathlib import Path

from host.record.record_prompts import SHOWN
from playwright.sync_api import Browser, Locator, Page, Response, expect

ARTIFACTS = Path(__file__).parent / "artifacts"
BAR = "#vram-headroom-bar"
QUESTION = "dialog#vram-headroom-question"


class Session:
    """One page on one host or real ComfyUI, and how many prompts it posted."""

    def __init__(self, url: str, browser: Browser, wait_for_graph: str = SHOWN) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1400, "height": 860})
        self.posted = 0
        self.checks = 0
        self.page.on("response", self._note)
        self.page.goto(url)
        self.page.wait_for_function(wait_for_graph)
        expect(self.page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)

    def _note(self, response: Response) -> None:
        if response.request.method != "POST":
            return
        if response.url.endswith("/api/prompt") and response.status == 200:
            self.posted += 1
        if response.url.endswith("/vram/check"):
            self.checks += 1

    def run(self) -> None:
        self.page.get_by_test_id("queue-button").first.click()

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
