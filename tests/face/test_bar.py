"""The bar in real Chromium: bands, states, details, several cards, settings, and how little it asks for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from host.process import HostProcess
from playwright.sync_api import Locator, Route, expect
from session import BAR, STATUS, Session

GIB = 1 << 30
DETAILS = "#vram-headroom-details"


def card(pressure: float, index: int = 0, **changes: Any) -> dict[str, Any]:
    """A card of 16 GiB as the status route tells it."""
    used = int(16 * GIB * pressure / 100)
    found = {"index": index, "name": f"Simulated {index}", "kind": "cuda", "total_bytes": 16 * GIB, "used_bytes": used}
    found |= {"free_bytes": 16 * GIB - used, "reserved_bytes": 0, "active_bytes": 0, "ours_bytes": 0, "others_bytes": used}
    found |= {"reclaimable_free_bytes": 16 * GIB - used, "utilization_percent": pressure, "pressure_percent": pressure}
    return {**found, "stale": False, "age_seconds": 0.1, **changes}


def status(*cards: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"version": "0.1.0", "devices": list(cards), "pipelines": [], "loaded_models": [], **rest}


def show(session: Session, answer: Any) -> Locator:
    """The server says this from now on, and the page looks at once."""
    session.page.unroute(STATUS)
    session.page.route(STATUS, answer if callable(answer) else lambda route: route.fulfill(json=answer))
    look(session)
    return session.page.locator(BAR)


def look(session: Session) -> None:
    """What ComfyUI says when a queue has changed."""
    session.page.evaluate("() => window.comfyAPI.api.api.dispatchEvent(new CustomEvent('status', { detail: null }))")


@pytest.mark.parametrize(
    ("percent", "level", "word"),
    [
        (0, "ok", ""),
        (59, "ok", ""),
        (60, "high", "high"),
        (79, "high", "high"),
        (80, "very_high", "very high"),
        (89, "very_high", "very high"),
        (90, "critical", "critical"),
        (100, "critical", "critical"),
    ],
)
def test_bands_have_a_colour_a_word_and_an_icon(
    host: HostProcess, session: Session, percent: int, level: str, word: str
) -> None:
    # the simulated card's own books, through the real route: what other programs hold can't be given back
    host.post("/_host/others", {"bytes": -(-percent * GIB // 100)})
    look(session)
    bar = session.page.locator(BAR)
    session.await_bar(pressure=percent, level=level)
    expect(bar.get_by_role("meter")).to_have_attribute("aria-valuenow", str(percent))
    expect(bar.locator(".vrh-words b")).to_have_text(f"{percent} %")
    expect(bar.locator(".vrh-level")).to_have_text(word)
    paths = {"ok": 2, "high": 3, "very_high": 2, "critical": 2}
    assert bar.locator(".vrh-icon path").count() == paths[level]


def test_bands_differ_in_icon_and_colour(session: Session) -> None:
    looks = []
    for percent in (10, 60, 80, 90):
        bar = show(session, status(card(percent)))
        session.await_bar(pressure=percent)
        colour = bar.locator("[data-kind=in-use]").evaluate("(element) => getComputedStyle(element).backgroundColor")
        looks.append((colour, bar.locator(".vrh-icon").inner_html(), bar.locator(".vrh-level").inner_text()))
    assert len({icon for _, icon, _ in looks}) == 4
    assert len({words for *_, words in looks}) == 4
    assert len({colour for colour, *_ in looks}) == 3, "green, amber, and red for both of the highest"


def test_a_crossing_of_the_critical_mark_is_told_once_and_to_the_ear_politely(session: Session) -> None:
    toast = session.page.get_by_text("VRAM is nearly full")
    # toasts go after six seconds
    session.set_setting("VRAMHeadroom.PollSeconds", 1)
    show(session, status(card(84)))
    session.await_bar(pressure=84, level="very_high")
    assert toast.count() == 0
    show(session, status(card(91)))
    expect(toast.first).to_be_visible()
    once = toast.count()
    for percent in (89, 92, 86, 95):
        show(session, status(card(percent)))
        session.await_bar(pressure=percent, level="critical")
    assert toast.count() == once
    expect(session.toast("Simulated 0: 91 % cannot be given back, 1.4 GB are left.")).to_be_visible()
    live = session.page.locator(f"{BAR} [aria-live=polite]")
    expect(live).to_have_text(re.compile("VRAM pressure 91 percent, critical"))
    show(session, status(card(20)))
    session.await_bar(level="ok")
    session.set_setting("VRAMHeadroom.PollSeconds", 3)


def test_ours_reclaimable_others_and_free_are_told_apart(session: Session) -> None:
    device = card(50, used_bytes=12 * GIB, free_bytes=4 * GIB, others_bytes=2 * GIB, reclaimable_free_bytes=8 * GIB)
    bar = show(session, status(device))
    session.await_bar(pressure=50, used_bytes=12 * GIB)
    widths = {
        kind: bar.locator(f".vrh-track [data-kind={kind}]").evaluate("(e) => e.style.width")
        for kind in ("in-use", "reclaimable", "others")
    }
    assert widths == {"in-use": "37.5%", "reclaimable": "25%", "others": "12.5%"}
    expect(bar).to_contain_text("12 of 16 GB")


def abort(route: Route) -> None:
    route.abort("connectionrefused")


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (lambda route: route.fulfill(status=500, body="no"), "error", "VRAM ?"),
        (lambda route: route.fulfill(body="<html>"), "error", "VRAM ?"),
        (abort, "disconnected", "VRAM offline"),
        (status(), "no_gpu", "No GPU"),
    ],
)
def test_without_a_reading_the_bar_says_why_and_comes_back(session: Session, answer: Any, state: str, words: str) -> None:
    bar = show(session, answer)
    expect(bar).to_have_attribute("data-state", state)
    expect(bar.locator(".vrh-words")).to_have_text(words)
    expect(bar.get_by_role("img")).to_have_attribute("aria-label", re.compile("No GPU|VRAM not known: "))
    show(session, status(card(20)))
    expect(bar).to_have_attribute("data-state", "ok")
    expect(bar.get_by_role("meter")).to_be_visible()


def test_an_old_reading_is_marked(session: Session) -> None:
    bar = show(session, status(card(20, stale=True, age_seconds=12.4)))
    expect(bar).to_have_attribute("data-stale", "true")
    expect(bar).to_contain_text("(old)")
    with details(session) as panel:
        expect(panel).to_contain_text("12 s old")


@contextmanager
def details(session: Session) -> Iterator[Locator]:
    """The details, opened with the keyboard and closed with Escape."""
    button = session.page.get_by_role("button", name="VRAM details")
    button.focus()
    session.page.keyboard.press("Enter")
    panel = session.page.locator(DETAILS)
    expect(panel).to_be_visible()
    expect(button).to_have_attribute("aria-expanded", "true")
    yield panel
    session.page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(button).to_be_focused()


def test_the_details_name_every_figure_and_every_model_with_its_place(session: Session) -> None:
    parts = [
        {"name": "high", "role": "generator", "placement": "partial", "bytes": 14 * GIB, "bytes_on_card": 7 * GIB},
        {"name": "umt5", "role": "text_encoder", "placement": "cpu", "bytes": 6 * GIB, "bytes_on_card": 0},
    ]
    idle = [{"name": "vae", "role": "vae", "placement": "gpu", "bytes": GIB, "bytes_on_card": GIB}]
    pipelines = [
        {"name": "wan", "state": "active", "components": parts},
        {"name": "old", "state": "idle", "components": idle},
        {"name": "gone", "state": "offloaded", "components": []},
    ]
    show(session, status(card(50, reserved_bytes=None), pipelines=pipelines))
    session.await_bar(pressure=50)
    with details(session) as panel:
        for words in ("Total", "Used", "Free", "Reserved", "Active", "Other programs", "Can be given back", "not known"):
            expect(panel.get_by_text(words, exact=True).first).to_be_visible()
        expect(panel).to_contain_text("high (generator)14 GB, 50 % on the card, active")
        expect(panel).to_contain_text("umt5 (text encoder)6 GB, in RAM, offloaded")
        expect(panel).to_contain_text("vae (VAE)1 GB, on the card, idle")
        dots = panel.locator("[data-dot]").evaluate_all("(all) => all.map((dot) => dot.dataset.dot)")
        assert dots == ["active", "active", "offloaded", "idle", "idle", "offloaded"]
        session.shot("details")


def test_of_several_cards_the_fullest_is_shown_until_another_is_chosen(session: Session) -> None:
    bar = show(session, status(card(20), card(70, index=1)))
    session.await_bar(pressure=70)
    expect(bar).to_contain_text("GPU 1:")
    with details(session) as panel:
        expect(panel.get_by_role("radio", name="the fullest")).to_be_checked()
        panel.get_by_role("radio", name="GPU 0: Simulated 0").check()
        session.await_bar(pressure=20)
        session.shot("two-cards")
    show(session, status(card(30), card(70, index=1)))
    session.await_bar(pressure=30)


def test_used_percent_can_be_shown_instead_and_colours_still_follow_pressure(session: Session) -> None:
    session.set_setting("VRAMHeadroom.BarShows", "used")
    bar = show(session, status(card(30, used_bytes=15 * GIB, free_bytes=GIB, reclaimable_free_bytes=11 * GIB)))
    expect(bar.locator(".vrh-words b")).to_have_text("93 % used")
    expect(bar).to_have_attribute("data-level", "ok")
    expect(bar.get_by_role("meter", name="VRAM used")).to_have_attribute("aria-valuenow", "93")


def test_the_mark_of_the_warning_can_be_set(session: Session) -> None:
    session.set_setting("VRAMHeadroom.WarnAtPercent", 70)
    show(session, status(card(72)))
    session.await_bar(level="critical")


def test_switched_off_nothing_is_left_and_switched_on_it_is_back(session: Session) -> None:
    asked: list[str] = []
    session.set_setting("VRAMHeadroom.ShowBar", False)
    expect(session.page.locator(BAR)).to_have_count(0)
    assert session.page.locator(DETAILS).count() == 0
    session.page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/hardware/vram") else None)
    look(session)
    session.page.wait_for_timeout(1700)  # longer than two updates are apart
    assert asked == []
    session.set_setting("VRAMHeadroom.ShowBar", True)
    expect(session.page.locator(BAR)).to_have_attribute("data-state", "ok")


def test_the_check_switched_off_leaves_comfyuis_own_functions(session: Session) -> None:
    own = "() => ['api', 'app'].map((name) => Object.hasOwn(window.comfyAPI[name][name], 'queuePrompt'))"
    assert session.page.evaluate(own) == [True, True]
    session.set_setting("VRAMHeadroom.AskBeforeQueueing", "off")
    session.page.wait_for_function(f"() => !({own})().includes(true)")
    session.press(session.queue)
    assert session.checks == 0


@pytest.mark.parametrize("menu", ["Top", "Bottom", "Disabled"])
def test_every_place_of_the_menu_has_the_bar_in_sight(session: Session, menu: str) -> None:
    session.set_setting("Comfy.UseNewMenu", menu)
    expect(session.page.locator(BAR)).to_be_in_viewport(ratio=1)
    session.page.wait_for_timeout(300)  # the floating menu finds its place only after it was shown
    expect(session.page.locator(BAR)).to_be_in_viewport(ratio=1)
    assert session.page.locator(BAR).count() == 1
    session.shot(f"menu-{menu.lower()}")


@pytest.mark.parametrize("width", [480, 899])
def test_below_900_pixels_it_is_an_icon_and_a_figure_and_run_stays_in_sight(session: Session, width: int) -> None:
    show(session, status(card(91)))
    session.await_bar(pressure=91)
    session.page.set_viewport_size({"width": width, "height": 800})
    bar = session.page.locator(BAR)
    expect(bar.locator(".vrh-track")).to_be_hidden()
    expect(bar.locator(".vrh-words b")).to_be_visible()
    box = bar.bounding_box()
    assert box is not None
    assert box["width"] <= 90
    expect(session.page.get_by_test_id("queue-button").first).to_be_in_viewport()
    session.shot(f"bar-{width}")


def test_in_app_mode_a_badge_takes_the_bars_place_and_follows(session: Session) -> None:
    show(session, status(card(72)))
    session.await_bar(pressure=72)
    assert session.page.get_by_text("VRAM 72 %").count() == 0, "the bar is there: no badge beside it"
    toggle = "() => window.comfyAPI.app.app.extensionManager.command.execute('Comfy.ToggleLinear')"
    session.page.evaluate(toggle)
    try:
        expect(session.page.get_by_text("VRAM 72 % high").filter(visible=True).first).to_be_visible()
        session.shot("app-mode")
        show(session, status(card(95)))
        expect(session.page.get_by_text("VRAM 95 % critical").filter(visible=True).first).to_be_visible()
    finally:
        session.page.evaluate(toggle)
    expect(session.page.locator(BAR)).to_be_visible()


def test_a_hidden_tab_asks_nothing_and_looks_at_once_when_it_is_back(session: Session) -> None:
    asked: list[str] = []
    session.page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/hardware/vram") else None)
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    session.page.evaluate(hide, True)
    asked.clear()
    for _ in range(20):
        look(session)
    session.page.wait_for_timeout(1700)
    assert asked == []
    with session.page.expect_request(STATUS):
        session.page.evaluate(hide, False)


def test_a_flood_of_events_brings_an_update_now_and_then_and_an_unchanged_card_draws_nothing(session: Session) -> None:
    show(session, status(card(20)))
    session.await_bar(pressure=20)
    asked: list[str] = []
    session.page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/hardware/vram") else None)
    updates = session.bar("updates")
    flood = """async () => {
        const until = performance.now() + 4000;
        while (performance.now() < until) {
            for (let i = 0; i < 50; i++) window.comfyAPI.api.api.dispatchEvent(new CustomEvent("status", { detail: null }));
            await new Promise((resolve) => setTimeout(resolve, 10));
        }
    }"""
    session.page.evaluate(flood)
    assert 2 <= len(asked) <= 4
    assert session.bar("updates") == updates


def test_ten_thousand_readings_leave_the_heap_as_it_was(session: Session) -> None:
    page = session.page
    cdp = page.context.new_cdp_session(page)
    readings = """async (count) => {
        const { Bar } = await import("/extensions/vram-headroom/bar.js");
        const bar = (window.tried ??= new Bar());
        document.body.append(bar.element);
        for (let i = 0; i < count; i++) {
            const device = { index: 0, name: "Simulated", total: 1000, used: i % 1000, free: 1000 - (i % 1000), reserved: null,
                active: null, ours: null, others: null, reclaimableFree: 1000 - (i % 1000), pressure: (i % 1000) / 10,
                stale: i % 7 === 0, age: i };
            const status = { version: "", devices: [device], pipelines: [], models: [] };
            bar.show({ state: i % 11 ? "ok" : "error", status, reason: "" });
        }
        bar.element.remove();
    }"""

    def heap() -> int:
        cdp.send("HeapProfiler.collectGarbage")
        return cdp.send("Runtime.getHeapUsage")["usedSize"]

    page.evaluate(readings, 100)
    before = heap()
    page.evaluate(readings, 10_000)
    after = heap()
    assert abs(after - before) < 0.05 * before, f"{before} -> {after}"
    page.evaluate("() => delete window.tried")
    cdp.detach()


def test_commands_take_no_keys(session: Session) -> None:
    found = session.page.evaluate(
        """() => window.comfyAPI.app.app.extensionManager.command.commands
            .filter((command) => command.id.startsWith("VRAMHeadroom."))
            .map((command) => [command.id, command.keybinding?.combo?.key ?? null])"""
    )
    assert found == [[f"VRAMHeadroom.{name}", None] for name in ("CheckGraph", "OffloadTextEncoder", "FreeAll")]


def test_all_models_can_be_unloaded(host: HostProcess, session: Session) -> None:
    with session.page.expect_response("**/api/free") as answered:
        session.page.evaluate("() => window.comfyAPI.app.app.extensionManager.command.execute('VRAMHeadroom.FreeAll')")
    assert answered.value.status == 200
    expect(session.toast("ComfyUI unloads all models")).to_be_visible()
    host.get("/_host/idle?timeout=30")
    assert host.get("/_host/loaded").body == []


def test_a_server_that_goes_away_and_comes_back_is_followed(session: Session) -> None:
    bar = show(session, abort)
    session.page.evaluate("() => window.comfyAPI.api.api.dispatchEvent(new CustomEvent('reconnecting'))")
    expect(bar).to_have_attribute("data-state", "disconnected")
    session.page.unroute(STATUS)
    session.page.evaluate("() => window.comfyAPI.api.api.dispatchEvent(new CustomEvent('reconnected'))")
    expect(bar).to_have_attribute("data-state", "ok")
