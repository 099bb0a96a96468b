"""The core of the browser side on the front ends people have, with classic nodes and with Vue's."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from answers import answer, fix
from host.process import HostProcess, start_host
from panels import BADGES, GIB, PANEL, badges, close_panel, device, event, gib, open_panel, phase, plan, play, running, serve
from playwright.sync_api import Browser, Route, expect
from session import BAR, CHECK, Session

VENV = Path(__file__).resolve().parents[2] / ".venv"
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


class Opened(NamedTuple):
    """A page of one of the front ends."""

    host: HostProcess
    session: Session
    version: str
    nodes: str
    said: list[str]
    """On its console."""


@pytest.fixture(
    scope="module",
    params=[(version, nodes) for version in ("1.58.1", "1.49.6", "1.35.9", "1.27.10") for nodes in ("classic", "vue")],
    ids="-".join,
)
def opened(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Opened]:
    version, nodes = request.param
    with start_host(vram_gb=16, template="", frontend=frontend(version)) as host:
        host.post("/api/settings/Comfy.VueNodes.Enabled", nodes == "vue")
        session = Session(host.url, browser, template="text_to_video_wan")
        said: list[str] = []
        session.page.on("console", lambda message: said.append(message.text))
        session.page.on("pageerror", lambda error: said.append(str(error)))
        try:
            yield Opened(host, session, version, nodes, said)
        finally:
            session.shot(f"end-{version}-{nodes}")
            session.page.close()


def test_bar_question_fix_and_undo(opened: Opened) -> None:
    host, session, version, nodes, said = opened
    page = session.page
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


GRAPH = {
    **plan(),
    "models": [
        {"node_id": "37", "role": "generator", "file": "wan.safetensors", "bytes": gib(2.6), "resident_bytes": gib(2.6)},
        {"node_id": "39", "role": "vae", "file": "another_vae.safetensors", "bytes": gib(0.24), "resident_bytes": gib(0.24)},
    ],
    "phases": [
        phase("text_encode", "Text encoding", "6", 6.3, 0.37),
        phase("sample", "Sampling", "3", 2.6, 1.9, steps=30),
        phase("vae_decode", "VAE decoding", "8", 0.24, 12.0, short_bytes=gib(1.5)),
    ],
}
"""A plan of the workflow on the canvas."""


def test_panel_run_actions_and_badges(opened: Opened) -> None:
    host, session, version, nodes, said = opened
    page = session.page
    page.unroute_all(behavior="ignoreErrors")
    quiet(host, session)
    said.clear()

    # a panel in the sidebar, with what the card holds and what can be done
    serve(session, running(taken_at=1000.0))
    panel = open_panel(session)
    expect(panel).to_contain_text("generator 5.6 GB")
    expect(panel).to_contain_text("42 % on the card, 3 s ago")
    page.route(re.compile("/vram/offload$"), lambda route: route.fulfill(json={"done": True, "freed_bytes": GIB}))
    panel.get_by_role("button", name="Offload sd_xl_base_1.0").click()
    expect(panel.locator(".vrh-told")).to_have_text("sd_xl_base_1.0 is off the card: 1 GB freed.")
    # an answer that is on its way is older and changes nothing
    event(session, "status", **running(taken_at=1000.5, devices=[device(24.0, ours=6)]))
    expect(panel).to_contain_text("24 GB")

    # a run, with its steps, its terms by keyboard, a recovery and its end
    play(session, 2)
    expect(panel.locator(".vrh-phase-row").nth(1)).to_contain_text("step 4 of 10")
    panel.locator(".vrh-phase-row button").first.focus()
    page.keyboard.press("ArrowDown")
    expect(panel.locator(".vrh-phase-row").nth(1)).to_contain_text("self-attention")
    play(session, 5, "done")
    told = {"node_id": "5", "attempt": 1, "freed_bytes": 0, "file": None, "at": 9.0, "same_picture": False}
    event(session, "recovery", prompt_id="run", kind="tiles", message="decoded in tiles", **told)
    expect(panel.locator(".vrh-incidents")).to_contain_text("In tiles at 9 s, node 5: decoded in tiles.")
    expect(panel.locator(".vrh-sentence")).to_have_text("Last run: predicted 10.2 GB, measured 10.1 GB.")
    session.shot(f"panel-{version}-{nodes}")

    # badges on loaders, samplers and decoders, taken away and put back by their setting
    for short, decode in ((gib(1.5), "peak 12.2 GB, short by 1.5 GB"), (0, "peak 12.2 GB")):
        GRAPH["phases"][2]["short_bytes"] = short
        session.set_setting("VRAMHeadroom.NodeBadges", False)
        page.wait_for_function(f"() => Object.keys(({BADGES})()).length === 0")
        page.unroute(CHECK)
        page.route(CHECK, lambda route: route.fulfill(json=GRAPH))
        session.set_setting("VRAMHeadroom.NodeBadges", True)
        page.wait_for_function(f"(text) => ({BADGES})()['8'] === text", arg=decode, timeout=20_000)
        assert badges(session) == {"37": "takes 2.6 GB", "39": "takes 0.2 GB", "3": "peak 4.5 GB", "8": decode}
        if nodes == "vue" and version != "1.27.10":  # whose first Vue nodes show no badges
            expect(page.locator('[data-node-id="8"]').get_by_text(decode, exact=True)).to_have_count(1, timeout=20_000)
    session.shot(f"badges-{version}-{nodes}")

    close_panel(session)
    assert page.locator(PANEL).count() == 0
    assert [line for line in said if "headroom" in line.lower()] == []


def quiet(host: HostProcess, session: Session) -> None:
    """What was queued is over and forgotten, and the host tells this page nothing by itself."""
    session.set_setting("VRAMHeadroom.NodeBadges", False)
    host.post("/queue", {"clear": True})
    host.post("/interrupt")
    host.get("/_host/idle?timeout=60")
    host.post("/free", {"unload_models": True, "free_memory": True})
    host.get("/_host/idle?timeout=60")
    client = session.page.evaluate("() => window.comfyAPI.api.api.clientId")
    host.post("/api/v1/hardware/vram/watch", {"client_id": client, "watching": False})
    # older front ends show what was wrong with a prompt in a dialog over everything
    masks = session.page.locator(".p-dialog-mask")
    for _ in range(masks.count()):
        session.page.keyboard.press("Escape")
    expect(masks).to_have_count(0, timeout=20_000)


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
