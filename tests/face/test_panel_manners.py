"""The panel's manners: it asks only while somebody looks, draws only what has changed, and leaves nothing behind."""

from host.process import HostProcess
from panels import (
    PANEL,
    TAB,
    WATCH,
    busy,
    close_panel,
    component,
    device,
    event,
    open_panel,
    phase,
    plan,
    running,
    serve,
    status,
)
from playwright.sync_api import Locator, expect
from session import BAR, STATUS, Session

HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""

FLOOD = """([status, changing]) => new Promise((resolve) => {
    const api = window.comfyAPI.api.api;
    let drawn = 0;
    const seen = new MutationObserver(() => (drawn += 1));
    const everything = { childList: true, subtree: true, characterData: true, attributes: true };
    seen.observe(document.querySelector("#vram-headroom-panel"), everything);
    let i = 0;
    const timer = setInterval(() => {
        i += 1;
        const used_bytes = status.devices[0].used_bytes - (changing ? i * 1e7 : 0);
        const detail = { ...status, devices: [{ ...status.devices[0], used_bytes }] };
        api.dispatchEvent(new CustomEvent("vram_headroom.status", { detail }));
        if (i < 100) return;
        clearInterval(timer);
        seen.disconnect();
        resolve(drawn);
    }, 20);
})"""

CYCLE = """async ([id, panel, times]) => {
    const { sidebarTab } = window.comfyAPI.app.app.extensionManager;
    const until = (there) => new Promise((resolve) => {
        const look = () => (Boolean(document.querySelector(panel)) === there ? resolve() : requestAnimationFrame(look));
        look();
    });
    for (let i = 0; i < times; i++) {
        sidebarTab.toggleSidebarTab(id);
        await until(true);
        sidebarTab.toggleSidebarTab(id);
        await until(false);
    }
}"""


def test_it_speaks_the_persons_language_where_the_locales_folder_has_it(host: HostProcess, session: Session) -> None:
    page = session.page
    serve(session, running())
    page.route("**/api/i18n", lambda route: route.fulfill(json={"fr": {"vramHeadroom": {"models_title": "Modèles"}}}))
    for locale, title in (("fr", "Modèles"), ("en", "Models")):
        host.post("/api/settings/Comfy.Locale", locale)
        page.reload()
        expect(page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)
        expect(open_panel(session).get_by_role("heading", name=title, exact=True)).to_be_visible()
        close_panel(session)


TRACK = """() => {
    const counted = (window.counted = { timers: new Set(), intervals: new Set(), listeners: 0 });
    const undo = [];
    const wrap = (owner, name, make) => {
        const raw = owner[name];
        owner[name] = make(raw);
        undo.push(() => (owner[name] = raw));
    };
    const ours = () => /vram-headroom/.test(new Error().stack);
    wrap(window, "setInterval", (raw) => (...args) => {
        const id = raw(...args);
        if (ours()) counted.intervals.add(id);
        return id;
    });
    wrap(window, "clearInterval", (raw) => (id) => (counted.intervals.delete(id), raw(id)));
    for (const target of [window, document]) {
        wrap(target, "addEventListener", (raw) => function (...args) {
            if (ours()) counted.listeners += 1;
            return raw.apply(target, args);
        });
        wrap(target, "removeEventListener", (raw) => function (...args) {
            if (ours()) counted.listeners -= 1;
            return raw.apply(target, args);
        });
    }
    window.untrack = () => undo.forEach((one) => one());
}"""


def test_it_watches_while_it_is_on_screen_and_no_longer(session: Session) -> None:
    beats = serve(session, running())
    session.page.wait_for_timeout(300)  # a beat would be there by now
    assert beats == []
    with session.page.expect_response(WATCH):
        open_panel(session)
    client = session.page.evaluate("() => window.comfyAPI.api.api.clientId")
    assert beats == [{"client_id": client, "watching": True}]
    try:
        for hidden in (True, False):
            with session.page.expect_response(WATCH):
                session.page.evaluate(HIDE, hidden)
            assert beats[-1]["watching"] is not hidden
    finally:
        session.page.evaluate(HIDE, False)
    with session.page.expect_response(WATCH):
        event(session, "reconnected")
    with session.page.expect_response(WATCH):
        close_panel(session)
    assert beats[-1] == {"client_id": client, "watching": False}


def test_events_are_shown_as_they_come_and_without_them_it_polls(session: Session) -> None:
    serve(session, running(taken_at=1000.0))
    panel = open_panel(session)
    # a question may be on its way: its answer is older and changes nothing
    event(session, "status", **running(taken_at=1000.5, devices=[device(24.0, ours=6)]))
    expect(panel.locator(".vrh-stack-block").first).to_contain_text("24 GB")
    with session.page.expect_request(STATUS, timeout=20_000):
        pass
    serve(session, running(taken_at=1010.0))
    expect(panel.locator(".vrh-stack-block").first).to_contain_text("12 GB", timeout=20_000)
    close_panel(session)


def test_a_flood_of_events_is_drawn_twice_a_second_and_an_unchanged_reading_not_at_all(
    session: Session, panel: Locator
) -> None:
    session.page.evaluate(FLOOD, [running(), False])
    assert session.page.evaluate(FLOOD, [running(), False]) == 0
    # about two seconds; one drawing is one call of the observer
    assert 2 <= session.page.evaluate(FLOOD, [running(), True]) <= 6


def test_user_text_never_becomes_html(session: Session, panel: Locator) -> None:
    evil = "<img src=x onerror=window.pwned=1>"
    answer = running()
    answer["pipelines"][0]["name"] = answer["pipelines"][0]["components"][0]["name"] = evil
    answer["devices"][0]["name"] = answer["seams"][0]["name"] = evil
    event(session, "status", **answer)
    event(session, "plan", prompt_id="evil", plan={**plan(), "phases": [phase("sample", evil, "1", 1, 1)]})
    event(session, "recovery", prompt_id="evil", node_id=evil, kind=evil, at=1.0, same_picture=True, message=evil, file=evil)
    expect(panel.locator(".vrh-phase-row").filter(has_text=evil)).to_have_count(1)
    assert panel.locator("img").count() == 0
    assert session.page.evaluate("() => window.pwned") is None


def test_opened_and_closed_a_hundred_times_it_leaves_no_listener_timer_or_node(session: Session) -> None:
    page = session.page
    serve(session, running())
    cdp = page.context.new_cdp_session(page)

    def figures() -> dict[str, int]:
        for _ in range(3):
            cdp.send("HeapProfiler.collectGarbage")
        metrics = {one["name"]: one["value"] for one in cdp.send("Performance.getMetrics")["metrics"]}
        return {name: int(metrics[name]) for name in ("Nodes", "JSEventListeners")}

    cdp.send("Performance.enable")
    page.evaluate(CYCLE, [TAB, PANEL, 5])
    page.evaluate(TRACK)
    before = figures()
    page.evaluate(CYCLE, [TAB, PANEL, 100])
    after = figures()
    counted = page.evaluate("() => ({ intervals: window.counted.intervals.size, listeners: window.counted.listeners })")
    page.evaluate("() => window.untrack()")
    cdp.detach()
    assert counted == {"intervals": 0, "listeners": 0}
    # one panel has over 200 nodes and 15 listeners: a hundred that stay would be thousands
    assert after["Nodes"] - before["Nodes"] < 200, (before, after)
    assert after["JSEventListeners"] - before["JSEventListeners"] < 15, (before, after)
    assert page.locator(PANEL).count() == 0


def test_fifty_models_are_listed_and_reached(session: Session, panel: Locator) -> None:
    parts = [component(100 + i, f"model {i}", "generator", 1 + i / 10, 0.1) for i in range(50)]
    serve(session, status(busy(), pipelines=[{"name": "many", "state": "idle", "components": parts}]))
    expect(panel.locator(".vrh-model")).to_have_count(50)
    last = panel.get_by_role("button", name="Pin model 49")
    last.focus()
    expect(last).to_be_in_viewport()
