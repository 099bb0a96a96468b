"""The panel and the badges on the stand-in host: a run of the official two-expert graph, followed from its plan to its end."""

import re
from collections.abc import Iterator

import pytest
from chromium import chromium
from host.process import HostProcess, start_host
from panels import BADGES, badges, open_panel
from playwright.sync_api import Browser, Locator, expect
from prompts import official
from session import Session

GIB = 1 << 30
TEMPLATE = "video_wan2_2_14B_t2v"
HIGH, LOW, DECODE = "128:81", "128:78", "128:87"
LOADERS = {"128:71": "6.3 GB", "128:73": "0.2 GB", "128:75": "13.3 GB", "128:76": "13.3 GB"}

LINE = """(plot) => [...plot.querySelector(".vrh-plot-line").getAttribute("d").matchAll(/[ML]([\\d.]+) ([\\d.]+)/g)]
    .map(([, x, y]) => [Number(x), 100 - Number(y)])"""
"""The points of the measured line, in thousandths of the width and percent of the height."""

BARS = """(plot) => [...plot.querySelectorAll("g[data-index]")].map((bar) => {
    const at = (part, name) => Number(bar.querySelector(`[data-part=${part}]`)?.getAttribute(name));
    return { left: at("room", "x"), right: at("room", "x") + at("room", "width"), upper: 100 - at("upper", "y1") };
})"""


INSIDE = """(id) => {
    const { rootGraph, canvas } = window.comfyAPI.app.app;
    const [outer, inner] = id.split(":");
    const node = rootGraph.nodes.find((one) => String(one.id) === outer);
    canvas.openSubgraph(node.subgraph, node);
    const target = node.subgraph.nodes.find((one) => String(one.id) === inner);
    canvas.ds.scale = 0.85;
    canvas.ds.offset = [720 - target.pos[0], 240 - target.pos[1]];
    canvas.setDirty(true, true);
}"""
"""The canvas shows this node in its subgraph, beside the panel."""

PAINTED = "() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(true))))"

OUTSIDE = "() => window.comfyAPI.app.app.canvas.setGraph(window.comfyAPI.app.app.rootGraph)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with start_host(vram_gb=16, template=TEMPLATE) as running:
        yield running


@pytest.fixture(scope="module")
def session(host: HostProcess, browser: Browser) -> Iterator[Session]:
    opened = Session(host.url, browser)
    yield opened
    opened.page.close()


@pytest.fixture
def panel(host: HostProcess, session: Session) -> Locator:
    """Open, with nothing loaded, cached or running."""
    host.post("/_host/release")
    host.post("/free", {"unload_models": True, "free_memory": True})
    host.get("/_host/idle?timeout=60")
    return open_panel(session, "Simulated 16 GB")


def wait_for_badges(session: Session, expected: dict[str, str]) -> dict[str, str]:
    """What all badges say, once these say what they are to say somewhere."""
    there = "Object.entries(wanted).every(([id, text]) => (found[id] ?? '').includes(text))"
    script = f"(wanted) => {{ const found = ({BADGES})(); return {there}; }}"
    session.page.wait_for_function(script, arg=expected, timeout=30_000)
    return badges(session)


def row(panel: Locator, number: int) -> Locator:
    return panel.locator(".vrh-phase-row").nth(number)


def test_a_run_of_two_experts_shows_its_phases_in_order_within_their_bands_and_on_every_node(
    host: HostProcess, session: Session, panel: Locator
) -> None:
    predicted = wait_for_badges(session, {HIGH: "peak"})
    assert {id: predicted[id] for id in LOADERS} == {id: f"takes {size}" for id, size in LOADERS.items()}
    assert (predicted[HIGH], predicted[LOW], predicted[DECODE]) == ("peak 13.2 GB", "peak 13.2 GB", "peak 12.7 GB")
    assert predicted["128"] == "peak 13.2 GB", "the subgraph says what the worst of its nodes says"
    assert set(predicted) == {*LOADERS, HIGH, LOW, DECODE, "128"}

    host.post("/_host/hold", {"node_id": HIGH, "step": 4})
    session.press(session.run)
    host.get("/_host/held?timeout=60")
    expect(row(panel, 1)).to_have_attribute("data-state", "running", timeout=30_000)
    expect(row(panel, 1)).to_contain_text("of 10", timeout=30_000)
    expect(row(panel, 0)).to_have_attribute("data-state", "done")
    expect(row(panel, 2)).to_have_attribute("data-state", "waiting")
    refused = panel.get_by_role("button", name="Offload wan2.2_t2v_high_noise_14B_fp8_scaled: it is in use")
    expect(refused).to_have_attribute("aria-disabled", "true", timeout=30_000)
    session.shot("panel-live-running")

    host.post("/_host/hold", {"node_id": LOW, "step": 2})  # and with that the first is let go
    expect(row(panel, 2)).to_have_attribute("data-state", "running", timeout=30_000)
    expect(row(panel, 1)).to_have_attribute("data-state", "done")
    measured = wait_for_badges(session, {HIGH: "predicted"})
    assert measured[HIGH].startswith("peak 13")
    assert measured[HIGH].endswith("13.2 predicted")
    assert measured[LOW] == "peak 13.2 GB"

    host.post("/_host/release")
    expect(panel.locator(".vrh-run")).to_contain_text("finished", timeout=60_000)
    expect(panel.locator(".vrh-sentence")).to_contain_text("Last run: predicted 13.2 GB, measured 13")
    titles = [text.split("\n")[0] for text in panel.locator(".vrh-phase-row").all_inner_texts()]
    assert titles == ["1 Text encoding ×2", "2 Sampling (high noise)", "3 Sampling (low noise)", "4 VAE decoding"]
    plot = panel.locator(".vrh-plot")
    points, bars = plot.evaluate(LINE), plot.evaluate(BARS)
    assert len(points) > 10
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    for x, y in points:
        # a phase begins at the height of the one before it
        assert any(bar["left"] - 0.5 <= x <= bar["right"] + 0.5 and y <= bar["upper"] + 0.1 for bar in bars), (x, y, bars)
    after = wait_for_badges(session, {DECODE: "predicted", LOW: "predicted"})
    assert (after[DECODE][:7], after[LOW][:7]) == ("peak 12", "peak 13")
    assert after["128:73"] == "0.2 GB, on the card"
    assert after["128:76"].startswith("13.3 GB, 7")
    assert after["128:76"].endswith("% on the card")
    assert after["128"] == after[HIGH]
    session.page.evaluate(INSIDE, HIGH)
    session.page.wait_for_function(PAINTED)
    session.shot("panel-live-finished")
    session.page.evaluate(OUTSIDE)


def test_what_the_run_measured_lies_within_what_was_predicted(host: HostProcess, session: Session, panel: Locator) -> None:
    """By the events themselves: the bounds of each phase, to one percent, against the peak that its node was seen to take."""
    report = session.page.evaluate(
        """async () => {
            const { api } = window.comfyAPI.api;
            const body = JSON.stringify({ client_id: api.clientId, watching: true });
            const headers = { "Content-Type": "application/json" };
            return (await (await api.fetchApi("/v1/hardware/vram/watch", { method: "POST", headers, body })).json()).run;
        }"""
    )
    bounds = {index: one["peak_allocated_bytes"] for index, one in enumerate(report["plan"]["phases"])}
    heavy = [one for one in report["measured"] if one["phase"] is not None and one["peak_bytes"] > 10 * GIB]
    assert len(heavy) == 3
    for one in heavy:
        band = bounds[one["phase"]]
        assert 0.99 * band["lower"] <= one["peak_bytes"] <= 1.01 * band["upper"], (one, band)


def test_actions_act_wait_and_are_refused(host: HostProcess, session: Session, panel: Locator) -> None:
    high, low = ("wan2.2_t2v_high_noise_14B_fp8_scaled", "wan2.2_t2v_low_noise_14B_fp8_scaled")
    host.post("/_host/hold", {"node_id": HIGH, "step": 1})
    session.press(session.run)
    host.get("/_host/held?timeout=60")

    # what computes is refused, by the panel and by the server, which has the last word
    refused = panel.get_by_role("button", name=f"Offload {high}: it is in use")
    expect(refused).to_have_attribute("aria-disabled", "true", timeout=30_000)
    used = next(one for one in host.get("/api/v1/hardware/vram").body["loaded_models"] if one["in_use"])
    assert host.post("/api/v1/hardware/vram/offload", {"key": used["key"]}).status == 409

    # what lies idle beside the decode waits for the node, and says so
    host.post("/_host/hold", {"node_id": DECODE})
    panel.get_by_role("button", name=f"Offload {low}", exact=True).click(timeout=60_000)
    expect(panel.get_by_text("Offload waits until the node has ended")).to_be_visible(timeout=30_000)
    assert [one["action"] for one in host.get("/api/v1/hardware/vram").body["waiting"]] == ["offload"]
    host.post("/_host/release")
    expect(panel.locator(".vrh-told")).to_contain_text(f"{low} is off the card: 9.", timeout=60_000)
    expect(panel.locator(".vrh-run")).to_contain_text("finished", timeout=60_000)

    # at once, between runs
    panel.get_by_role("button", name="Free all", exact=True).click()
    expect(panel.locator(".vrh-told")).to_contain_text("All idle models are off the card: 0.2 GB freed.", timeout=30_000)
    expect(panel.get_by_role("button", name="Free all: no model is on the card")).to_be_visible(timeout=30_000)
    assert [one for one in host.get("/api/v1/hardware/vram").body["loaded_models"] if one["bytes_on_card"]] == []


def test_a_command_sends_the_text_encoder_off_the_card(host: HostProcess, session: Session, panel: Locator) -> None:
    execute = "() => window.comfyAPI.app.app.extensionManager.command.execute('VRAMHeadroom.OffloadTextEncoder')"
    session.page.evaluate(execute)
    expect(session.toast("No text encoder is on the card")).to_be_visible()
    host.post("/prompt", {"prompt": official("text_to_video_wan")})
    host.get("/_host/idle?timeout=60")
    before = host.get("/_host/loaded").body
    session.page.evaluate(execute)
    expect(session.toast("The text encoder is off the card")).to_contain_text("6.3 GB freed", timeout=30_000)
    after = host.get("/_host/loaded").body
    assert len(before) - len(after) == 1


def test_a_recovery_appears_in_its_run_and_so_does_an_end_without_one(
    host: HostProcess, session: Session, panel: Locator
) -> None:
    incidents = panel.locator(".vrh-incidents")
    host.post("/_host/faults", [{"where": "attention", "number": 5}])
    session.press(session.run)
    expect(incidents).to_contain_text("Tried again", timeout=60_000)
    expect(incidents).to_contain_text(f"node {HIGH}: memory ran out in a step; freed part of the generator (")
    expect(panel.locator(".vrh-run")).to_contain_text("finished", timeout=60_000)
    assert panel.locator(".vrh-plot-mark").count() == incidents.locator("li").count() == 1
    session.shot("panel-live-recovered")

    # and where nothing helps: what was done is kept, and the run is seen to have failed
    host.post("/_host/faults", [{"where": "attention", "number": 9, "times": 9}])
    session.press(session.run)
    expect(incidents).to_contain_text("Gave up", timeout=60_000)
    expect(incidents).to_contain_text(re.compile(r"Steps kept.* is kept in vram_headroom_\S+\.latent, which Load Latent lists"))
    expect(panel.locator(".vrh-run")).to_contain_text("failed", timeout=60_000)
    session.shot("panel-live-gave-up")
    host.post("/_host/faults", [])
