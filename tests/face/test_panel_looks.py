"""How the panel looks in every state, dark and light: pictures for people, axe-core and contrast for the rest."""

from collections.abc import Callable

import pytest
from panels import PANEL, close_panel, device, event, gib, model, open_panel, play, running, serve, status
from playwright.sync_api import Locator, expect
from session import ARTIFACTS, BAR, Session

from face.test_looks import violations

GRAPHICS = """(panel) => {
    const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (colour) => {
        pixel.clearRect(0, 0, 1, 1);
        pixel.fillStyle = colour;
        pixel.fillRect(0, 0, 1, 1);
        return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map((value) => value / 255)
            .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
            .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    };
    const ratio = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05);
    };
    const style = getComputedStyle(panel);
    const colour = (name) => style.getPropertyValue(`--vrh-${name}`).trim();
    const kinds = ["generator", "text-encoder", "vae", "vision", "other", "work", "others", "good", "bad", "measured", "edge"];
    const ground = style.backgroundColor;
    return Object.fromEntries(kinds.flatMap((kind) => [
        [`${kind} on the track`, ratio(colour(kind), colour("track"))],
        [`${kind} on the panel`, ratio(colour(kind), ground)],
    ]));
}"""


def empty(session: Session) -> None:
    serve(session, status(device(12.0)))
    open_panel(session)


def in_a_run(session: Session) -> None:
    serve(session, running())
    panel = open_panel(session)
    play(session, 3, prompt_id="looks-running")
    expect(panel.locator(".vrh-phase-row").nth(2)).to_contain_text("step 4 of 10")


def finished(session: Session) -> None:
    serve(session, running())
    panel = open_panel(session)
    play(session, 5, "done", prompt_id="looks-done")
    told = {"node_id": "5", "attempt": 1, "freed_bytes": gib(3), "file": None, "at": 8.7, "same_picture": False}
    event(
        session,
        "recovery",
        prompt_id="looks-done",
        kind="tiles",
        message="decoded in tiles of 512 px after the card was full",
        **told,
    )
    expect(panel.locator(".vrh-incidents li")).to_have_count(1)
    panel.locator(".vrh-phase-row button").nth(1).click()
    panel.get_by_text("About this machine").click()


def failed(session: Session) -> None:
    answer = running(waiting=[{"id": "w", "action": "offload", "key": 9, "name": "sd_xl", "waited_seconds": 4.2}])
    serve(session, answer)
    panel = open_panel(session)
    play(session, 3, "failed", prompt_id="looks-failed")
    expect(panel.locator(".vrh-run")).to_contain_text("failed")
    told = {"node_id": "4", "freed_bytes": 0, "at": 6.5, "same_picture": True}
    event(
        session, "recovery", prompt_id="looks-failed", kind="retry", attempt=1, file=None, message="1.7 GB were freed", **told
    )
    message = "memory ran out again. 4 of 10 steps are kept"
    event(
        session,
        "recovery",
        prompt_id="looks-failed",
        kind="gave_up",
        attempt=2,
        file="latents/kept.latent",
        message=message,
        **told,
    )
    expect(panel.locator(".vrh-incidents li")).to_have_count(2)


def no_gpu(session: Session) -> None:
    serve(session, status())
    open_panel(session, "No GPU")


def two_gpus(session: Session) -> None:
    models = [
        model(1, "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "generator", 13.3, 13.3, in_use=True),
        model(2, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoder", 6.3, 6.3, device_index=1),
        model(3, "wan_2.1_vae.safetensors", "vae", 0.24, 0.24, device_index=1, dtype="bfloat16"),
    ]
    first = device(24.0, ours=17.6, others=0.8, name="NVIDIA GeForce RTX 4090")
    second = device(12.0, ours=6.7, others=3.9, back=6.5, index=1, name="NVIDIA GeForce RTX 3060")
    serve(session, status(first, second, loaded_models=models))
    open_panel(session, "GPU 1: NVIDIA GeForce RTX 3060")


STATES: dict[str, Callable[[Session], None]] = {
    "empty": empty,
    "no-gpu": no_gpu,
    "two-gpus": two_gpus,
    "running": in_a_run,
    "finished": finished,
    "failed": failed,
}


@pytest.fixture(scope="module", params=["dark", "light"])
def theme(shared: Session, request: pytest.FixtureRequest) -> str:
    return request.param


def dressed(session: Session, theme: str) -> None:
    session.set_setting("Comfy.ColorPalette", theme)
    expect(session.page.locator(BAR)).to_have_attribute("data-theme", theme)


def fresh(session: Session) -> None:
    """No run is remembered."""
    session.page.reload()
    expect(session.page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)


def within(panel: Locator) -> None:
    """Nothing is cut off at the side."""
    overflow = panel.evaluate("(panel) => panel.scrollWidth - panel.clientWidth")
    assert overflow <= 0
    cut = panel.evaluate(
        """(panel) => [...panel.querySelectorAll("*:not(.vrh-spoken):not(svg *)")]
            .filter((element) => element.getClientRects().length && element.scrollWidth > element.clientWidth + 1
                && element.clientWidth > 0 && getComputedStyle(element).overflowX === "hidden")
            .map((element) => element.outerHTML.slice(0, 120))"""
    )
    assert cut == []


def test_the_panel_in_every_state(session: Session, theme: str) -> None:
    page = session.page
    fresh(session)
    dressed(session, theme)
    page.set_viewport_size({"width": 1200, "height": 2150})
    ARTIFACTS.mkdir(exist_ok=True)
    for name, state in STATES.items():
        state(session)
        panel = page.locator(PANEL)
        expect(panel).to_have_attribute("data-theme", theme)
        panel.screenshot(path=ARTIFACTS / f"panel-{name}-{theme}.png")
        assert violations(session, PANEL) == [], name
        within(panel)
        ratios = panel.evaluate(GRAPHICS)
        assert min(ratios.values()) >= 3, (name, {part: ratio for part, ratio in ratios.items() if ratio < 3})
        close_panel(session)


@pytest.mark.parametrize("width", [480, 800])
def test_the_panel_on_a_narrow_page(session: Session, theme: str, width: int) -> None:
    dressed(session, theme)
    in_a_run(session)
    session.page.set_viewport_size({"width": width, "height": 900})
    panel = session.page.locator(PANEL)
    box = panel.bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= width
    within(panel)
    session.shot(f"panel-narrow-{width}-{theme}")
    close_panel(session)


def test_nothing_in_the_panel_moves_by_itself(session: Session) -> None:
    in_a_run(session)
    moving = session.page.locator(PANEL).evaluate(
        """(panel) => [panel, ...panel.querySelectorAll("*")].filter((element) => {
            const style = getComputedStyle(element);
            return style.animationName !== "none" || style.transitionDuration.split(",").some((time) => parseFloat(time) > 0);
        }).map((element) => element.outerHTML.slice(0, 120))"""
    )
    assert moving == []
    close_panel(session)
