"""What a node of ours has to say of its last run stays on it, and is no value of the graph."""

from host.process import HostProcess
from playwright.sync_api import expect
from session import Session

SAID = ".vram-headroom-said"
STATUS_NODE = {"1": {"class_type": "VRAMHeadroomStatus", "inputs": {}, "_meta": {"title": "VRAM Status"}}}


def test_the_text_of_the_last_run_is_on_the_node_and_not_in_the_graph(host: HostProcess, session: Session) -> None:
    session.let_prompts_run()
    page = session.page
    page.evaluate("(prompt) => window.comfyAPI.app.app.loadApiJson(prompt, 'status')", STATUS_NODE)
    session.press(session.run)
    assert host.get("/_host/idle").status == 200
    expect(page.locator(SAID)).to_contain_text("Simulated 1 GB: ")
    made = page.evaluate("async () => await window.comfyAPI.app.app.graphToPrompt()")
    assert made["output"]["1"]["inputs"] == {}
    (node,) = made["workflow"]["nodes"]
    assert not [value for value in node.get("widgets_values") or [] if value]
    # a second run replaces the text and adds no second one
    session.press(session.run)
    assert host.get("/_host/idle").status == 200
    expect(page.locator(SAID)).to_have_count(1)
