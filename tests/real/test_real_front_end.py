"""A real ComfyUI with its own front end in Chromium: the bar is there, Run asks first and the graph runs."""

from typing import Any

from chromium import chromium
from client import history_of
from playwright.sync_api import expect
from prompts import with_our_loaders
from real_comfyui import RealComfyUI
from session import ARTIFACTS, BAR, QUESTION, Session

LOAD = "(prompt) => window.comfyAPI.app.app.loadApiJson(prompt, 'two_stage')"
QUEUE = "() => { window.comfyAPI.app.app.queuePrompt(0, 1) }"


def test_the_bar_is_shown_the_check_is_asked_and_the_graph_runs(comfyui: RealComfyUI, two_stage: dict[str, Any]) -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    with chromium() as browser:
        session = Session(comfyui.url, browser, wait_for_graph="() => window.comfyAPI?.app?.app?.graph")
        session.page.evaluate(LOAD, with_our_loaders(two_stage))
        prompt_id = session.press(lambda: session.page.evaluate(QUEUE))
        entry = history_of(comfyui.url, prompt_id)
        assert entry["status"]["status_str"] == "success"
        assert entry["prompt"][3]["vram_headroom"]["verdict"] == "fits"
        expect(session.page.locator(BAR)).to_have_attribute("data-last-check", "fits")
        session.await_bar(pressure=0)
        assert session.used() > 0
        expect(session.page.locator(QUESTION)).to_be_hidden()
        session.shot("real-comfyui")
