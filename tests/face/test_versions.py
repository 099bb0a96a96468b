"""The core of the browser side on the front ends people have, with classic nodes and with Vue's."""

import uuid
from pathlib import Path
from typing import Any

import pytest
from answers import answer, fix
from host.process import start_host
from playwright.sync_api import Browser, Route, expect
from session import BAR, CHECK, Session

VENV = Path(__file__).resolve().parents[2] / ".venv"
GIB = 1 << 30

VALUE = """([id, name]) => {
    const app = window.comfyAPI.app.app;
    const node = (app.rootGraph ?? app.graph).nodes.find((one) => String(one.id) === id);
    return name ? node.widgets.find((widget) => widget.name === name).value : node.type;
}"""

STEP_IS_CLOSED = """() => {
    const tracker = window.comfyAPI.app.app.extensionManager.workflow.activeWorkflow.changeTracker;
    return tracker.changeCount === 0 && tracker.undoQueue.length > 0;
}"""
"""All of it is queued, and what queueing changed on the canvas belongs to the same step of undo."""


def frontend(version: str) -> Path | None:
    """Where `tests/run.py` put a front end; None for the installed one."""
    if version == "1.58.1":
        return None
    folder = VENV / f"frontend-{version}"
    if not folder.is_dir():
        raise RuntimeError(f"front end {version} is not there: `python3 tests/run.py test` installs it")
    return folder


@pytest.mark.parametrize("nodes", ["classic", "vue"])
@pytest.mark.parametrize("version", ["1.58.1", "1.49.6", "1.35.9", "1.27.10"])
def test_bar_question_fix_and_undo(browser: Browser, version: str, nodes: str) -> None:
    with start_host(vram_gb=16, template="", frontend=frontend(version)) as host:
        host.post("/api/settings/Comfy.VueNodes.Enabled", nodes == "vue")
        session = Session(host.url, browser, template="text_to_video_wan")
        page = session.page
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        try:
            assert page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__") == version

            # the bar follows the card, left of Run and in sight
            host.post("/_host/others", {"bytes": 16 * GIB * 60 // 100 + 1})
            session.await_bar(pressure=60, level="high")
            expect(page.locator(BAR)).to_be_in_viewport(ratio=1)
            host.post("/_host/others", {"bytes": 0})
            session.await_bar(pressure=0, level="ok")

            # a batch of three is asked about once, and cancelled leaves nothing behind
            page.route(CHECK, lambda route: route.fulfill(json=answer()))
            session.queue(3)
            expect(session.question.get_by_role("button", name="Cancel")).to_be_focused()
            page.keyboard.press("Control+Enter")
            page.keyboard.press("Escape")
            expect(session.question).to_be_hidden()
            page.wait_for_timeout(300)  # a second question, a post or an error dialog would be there by now
            assert (session.checks, session.posted, session.question.count()) == (1, 0, 0)
            assert page.locator("[role=dialog]:visible").count() == 0

            # a fix changes a widget and a node's class; the prompt is posted with both; one undo brings both back
            tiled = {"tile_size": 448, "overlap": 64, "temporal_size": 36, "temporal_overlap": 8}
            inputs = {"samples": ["3", 0], "vae": ["39", 0], **tiled}
            shorter = {"node_id": "40", "input": "length", "value": 17, "old": 33}
            found = answer(fix("Tiles", {"node_id": "8", "class_type": "VAEDecodeTiled", "inputs": inputs}, shorter))
            fits = {"verdict": "fits", "message": "It fits."}

            def check(route: Any) -> None:
                whole = route.request.post_data_json["prompt"]["8"]["class_type"] == "VAEDecode"
                route.fulfill(json=found if whole else fits)

            page.unroute(CHECK)
            page.route(CHECK, check)
            # queued and never run: what a run puts on the canvas, such as previews, is a step of undo of the front end's own
            page.route("**/api/prompt", queued)
            with page.expect_request(lambda request: request.url.endswith("/api/prompt")) as posted:
                session.queue()
                session.question.get_by_role("button", name="Apply and run").click()
            body = posted.value.post_data_json or {}
            prompt = body["prompt"]
            assert (prompt["8"]["class_type"], prompt["8"]["inputs"], prompt["40"]["inputs"]["length"]) == (
                "VAEDecodeTiled",
                inputs,
                17,
            )
            embedded = body["extra_data"]["extra_pnginfo"]["workflow"]["nodes"]
            assert next(node["type"] for node in embedded if str(node["id"]) == "8") == "VAEDecodeTiled"
            assert page.evaluate(VALUE, ["40", "length"]) == 17
            if nodes == "vue" and version != "1.27.10":  # whose first Vue nodes show nothing that changes from outside
                expect(page.locator('[data-node-id="40"] input').nth(2)).to_have_value("17")
            page.wait_for_function(STEP_IS_CLOSED)
            session.shot(f"fixed-{version}-{nodes}")
            page.locator("body").press("Control+z")
            page.wait_for_function(f"() => ({VALUE})(['8', '']) === 'VAEDecode'")
            assert page.evaluate(VALUE, ["40", "length"]) == 33
            page.unroute("**/api/prompt")

            # auto-queue never meets a dialog, and a check that fails lets the prompt through
            page.unroute(CHECK)
            page.route(CHECK, lambda route: route.fulfill(json=answer()))
            with page.expect_request("**/api/prompt"):
                if version in ("1.58.1", "1.49.6"):
                    session.queue(trigger="auto_queue")
                else:
                    auto_queue(session)
            assert session.question.count() == 0
            page.unroute(CHECK)
            page.route(CHECK, lambda route: route.fulfill(status=500, body="no"))
            # these front ends do not know an input of the template, so that the post is all that counts
            with page.expect_request("**/api/prompt"):
                session.queue()
            assert session.question.count() == 0
            assert [line for line in said if "headroom" in line.lower()] == []
        finally:
            session.shot(f"end-{version}-{nodes}")
            page.close()


def queued(route: Route) -> None:
    if route.request.method == "POST":
        route.fulfill(json={"prompt_id": str(uuid.uuid4()), "number": 1, "node_errors": {}})
    else:
        route.fallback()


def auto_queue(session: Session) -> None:
    """Front ends before 1.41 do not say who queues: what they say is that auto-queue is on."""
    session.page.evaluate("() => { window.comfyAPI.app.app.extensionManager.queueSettings.mode = 'change'; }")
    try:
        session.queue()
    finally:
        session.page.evaluate(
            "async () => { await new Promise((r) => setTimeout(r, 800));"
            " window.comfyAPI.app.app.extensionManager.queueSettings.mode = 'disabled'; }"
        )
