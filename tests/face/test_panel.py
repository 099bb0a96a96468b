"""The panel in real Chromium, on made-up readings: cards, memory, models, and what can be done with them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from panels import GIB, device, event, gib, model, running, serve, status
from playwright.sync_api import Locator, Route, expect
from session import STATUS, Session

ACTION = re.compile(r"/vram/(offload|pin|unpin|free)$")


def stack(panel: Locator, number: int = 0) -> list[str]:
    items = panel.locator(".vrh-stack-block").nth(number).locator(".vrh-parts li").all_inner_texts()
    return [" ".join(text.split()) for text in items]


def button(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("button", name=name)


def test_the_card_is_told_part_by_part_and_the_parts_add_up(panel: Locator) -> None:
    assert stack(panel) == [
        "generator 5.6 GB",
        "VAE 0.2 GB",
        "activations and caches 2.2 GB",
        "generator, can be given back 1.7 GB",
        "cached blocks, can be given back 0.2 GB",
        "other programs 1.1 GB",
        "kept free by ComfyUI 0.4 GB",
        "free 0.6 GB",
    ]
    expect(panel.locator(".vrh-stack-block").first).to_contain_text("NVIDIA RTX 4070 Ti · 12 GB")
    expect(panel.locator(".vrh-stack-block").first).to_contain_text("pressure 75 %, high · used 91 %")
    widths = panel.locator(".vrh-stack").first.locator("i").evaluate_all("(all) => all.map((i) => parseFloat(i.style.width))")
    assert sum(widths) == pytest.approx(100 * (12 - 0.6) / 12, abs=0.1)
    spoken = panel.locator(".vrh-stack").first.get_attribute("aria-label") or ""
    assert spoken.startswith("What NVIDIA RTX 4070 Ti · 12 GB holds: generator 5.6 GB")


def test_the_machines_memory_stands_beside_it_with_a_containers_limit(session: Session, panel: Locator) -> None:
    assert stack(panel, 1) == ["ComfyUI 18 GB", "everything else 6 GB", "available 40 GB"]
    answer = running()
    answer["ram"]["limit_bytes"] = 48 * GIB
    serve(session, answer)
    expect(panel.locator(".vrh-stack-block").nth(1)).to_contain_text("of 48 GB (the limit of this container")


def test_several_cards_have_a_block_each_with_their_own_models(session: Session, panel: Locator) -> None:
    models = [model(1, "a", "generator", 4, 4, in_use=True), model(2, "b", "vae", 2, 2, in_use=True, device_index=1)]
    serve(session, status(device(16, ours=4), device(8, ours=2, index=1), loaded_models=models))
    expect(panel.locator(".vrh-stack-block")).to_have_count(3)
    assert stack(panel)[0] == "generator 4 GB"
    assert stack(panel, 1)[0] == "VAE 2 GB"
    expect(panel.locator(".vrh-stack-block").nth(1)).to_contain_text("GPU 1: NVIDIA RTX 4070 Ti · 8 GB")


def test_models_are_listed_with_all_that_is_known_of_them(panel: Locator) -> None:
    rows = [" ".join(text.split()).replace(" ,", ",") for text in panel.locator(".vrh-model").all_inner_texts()]
    assert [row.replace(" Offload", "").replace(" Pin", "").replace(" Unpin", "") for row in rows] == [
        "WAN 2.2 high noise, in use 13.3 GB generator · float8_e4m3fn · 42 % on the card, 3 s ago in use",
        "WAN 2.2 low noise, off the card 13.3 GB generator · float8_e4m3fn · in RAM used 2 min ago",
        "UMT5-XXL, off the card 6.3 GB text encoder · float8_e4m3fn · in RAM used just now",
        "VAE 2.1, idle 0.2 GB VAE · float8_e4m3fn · on the card pinned · used 2 min ago",
        "sd_xl_base_1.0, idle 4.8 GB generator · float16 · 35 % on the card",
    ]
    expect(panel.get_by_role("heading", name="Loaded by ComfyUI")).to_be_visible()


def test_the_fold_tells_where_the_pack_holds_on_and_whether_its_estimates_agree(panel: Locator) -> None:
    about = panel.locator("details")
    expect(about.get_by_text("ComfyUI 0.33.0")).to_be_hidden()
    about.get_by_text("About this machine").click()
    expect(about).to_contain_text("ComfyUI 0.33.0, dynamic patchers, NORMAL_VRAM")
    expect(about).to_contain_text("node start and endlive")
    expect(about).to_contain_text("tiled VAE decode: tiles are not shownabsent")
    expect(about).to_contain_text("The estimates agree with this ComfyUI's own code.")


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (lambda route: route.fulfill(status=500, body="no"), "error", "No reading: the server answered 500"),
        (lambda route: route.abort("connectionrefused"), "disconnected", "No reading: ComfyUI does not answer"),
        (lambda route: route.fulfill(json=status()), "no_gpu", "No GPU: ComfyUI runs on the CPU"),
    ],
)
def test_without_a_reading_it_says_why_and_keeps_the_last(
    session: Session, panel: Locator, answer: Any, state: str, words: str
) -> None:
    page = session.page
    page.unroute(STATUS)
    page.route(STATUS, answer)
    session.page.evaluate("() => window.comfyAPI.api.api.dispatchEvent(new CustomEvent('status', { detail: null }))")
    expect(panel).to_have_attribute("data-state", state, timeout=20_000)
    expect(panel.locator(".vrh-panel-note")).to_contain_text(words)
    assert panel.locator(".vrh-stack-block").count() == (1 if state == "no_gpu" else 2)


def acting(session: Session, status_code: int, body: Any, done: Callable[[], None] = lambda: None) -> list[tuple[str, Any]]:
    asked: list[tuple[str, Any]] = []

    def answer(route: Route) -> None:
        done()
        asked.append((route.request.url.rpartition("/")[2], route.request.post_data_json))
        route.fulfill(status=status_code, json=body)

    session.page.unroute(ACTION)
    session.page.route(ACTION, answer)
    return asked


def test_actions_act_and_tell_what_they_did(session: Session, panel: Locator) -> None:
    asked = acting(session, 200, {"done": True, "freed_bytes": gib(1.7)})
    button(panel, "Offload sd_xl_base_1.0").click()
    expect(panel.locator(".vrh-told")).to_have_text("sd_xl_base_1.0 is off the card: 1.7 GB freed.")
    expect(session.page.locator("#vram-headroom-bar [aria-live=polite]")).to_have_text(
        "sd_xl_base_1.0 is off the card: 1.7 GB freed."
    )
    assert panel.locator("[aria-live], [role=status]").count() == 0, "the bar says it already"
    button(panel, "Unpin VAE 2.1").click()
    expect(panel.locator(".vrh-told")).to_have_text("VAE 2.1 is no longer pinned.")
    button(panel, "Pin WAN 2.2 low noise").click()
    expect(panel.locator(".vrh-told")).to_have_text("WAN 2.2 low noise is pinned to the card.")
    button(panel, "Free all").click()
    expect(panel.locator(".vrh-told")).to_have_text("All idle models are off the card: 1.7 GB freed.")
    assert asked == [("offload", {"key": 9}), ("unpin", {"key": 4}), ("pin", {"key": 2}), ("free", {})]


def test_an_action_that_cannot_be_done_is_reached_says_why_and_asks_nothing(session: Session, panel: Locator) -> None:
    asked = acting(session, 200, {"done": True, "freed_bytes": 0})
    for name in (
        "Offload WAN 2.2 high noise: it is in use",
        "Offload UMT5-XXL: it is off the card already",
        "Offload VAE 2.1: it is pinned",
    ):
        refused = button(panel, name)
        expect(refused).to_have_attribute("aria-disabled", "true")
        refused.focus()
        expect(refused).to_be_focused()
        session.page.keyboard.press("Enter")
    assert asked == []


def test_an_action_that_the_server_refuses_says_why(session: Session, panel: Locator) -> None:
    acting(session, 409, {"error": {"type": "busy", "message": "sd_xl is computing; wait until its node has run"}})
    button(panel, "Offload sd_xl_base_1.0").click()
    expect(panel.locator(".vrh-told")).to_have_text(
        "Offload sd_xl_base_1.0 did not work: sd_xl is computing; wait until its node has run"
    )
    expect(button(panel, "Offload sd_xl_base_1.0")).not_to_have_attribute("aria-disabled", "true")


def test_an_action_that_waits_says_for_what_until_it_is_done(session: Session, panel: Locator) -> None:
    outcome: dict[str, Any] = {"id": "a", "state": "waiting"}
    session.page.route("**/vram/actions/a", lambda route: route.fulfill(json=outcome))
    # as the server does: the action is listed from the moment it was asked for, and not before
    waiting: list[dict[str, Any]] = []
    serve(session, running(waiting=waiting))
    listed = {"id": "a", "action": "offload", "key": 9, "name": "sd_xl", "waited_seconds": 0.5}
    acting(session, 202, {"id": "a", "waiting": "node"}, lambda: waiting.append(listed))
    button(panel, "Offload sd_xl_base_1.0").click()
    expect(panel.get_by_text("Offload waits until the node has ended")).to_be_visible()
    expect(button(panel, "Offload sd_xl_base_1.0: it waits already")).to_have_attribute("aria-disabled", "true")
    outcome.update(state="done", freed_bytes=gib(1.7), message=None)
    serve(session, running())
    expect(panel.locator(".vrh-told")).to_have_text("sd_xl_base_1.0 is off the card: 1.7 GB freed.")
    assert panel.get_by_text("Offload waits").filter(visible=True).count() == 0


def test_focus_stays_on_a_button_while_figures_change(session: Session, panel: Locator) -> None:
    focused = button(panel, "Pin WAN 2.2 low noise")
    focused.focus()
    answer = running(taken_at=1000.5)
    answer["devices"] = [device(12.0, ours=3, others=1.1)]
    answer["pipelines"][0]["components"][0]["bytes_on_card"] = GIB
    event(session, "status", **answer)
    expect(panel).to_contain_text("7 % on the card")
    expect(focused).to_be_focused()
