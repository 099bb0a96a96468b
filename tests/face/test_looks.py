"""How it looks, dark and light, from a phone's width to a large screen: pictures for people, axe-core for the rest."""

import re
from pathlib import Path
from typing import Any

import pytest
from answers import answer, fix
from playwright.sync_api import expect
from session import ARTIFACTS, BAR, CHECK, QUESTION, Session

from face.test_bar import abort, card, details, show, status

AXE = Path(__file__).resolve().parents[2] / "node_modules" / "axe-core" / "axe.min.js"
GIB = 1 << 30

FIXES = (
    fix(
        "Decode the video in tiles of 512 px",
        {"node_id": "40", "input": "length", "value": 17, "old": 33},
        saves=5.1,
        picture="tiled",
        cost="9 tiles instead of one pass",
    ),
    fix(
        "Make the video 61 frames long instead of 81",
        {"node_id": "40", "input": "length", "value": 13, "old": 33},
        saves=2.3,
        picture="shorter",
    ),
    fix(
        "Make the video 1024×576 instead of 1280×720",
        {"node_id": "40", "input": "width", "value": 512, "old": 832},
        saves=3.4,
        picture="smaller",
    ),
    fix("Start ComfyUI with --lowvram", saves=2.4, picture="slower", note="The text encoder then runs on the CPU."),
)

PIPELINES = [
    {
        "name": "wan",
        "state": "active",
        "components": [
            {"name": "high noise", "role": "generator", "placement": "partial", "bytes": 14 * GIB, "bytes_on_card": 6 * GIB},
            {"name": "umt5", "role": "text_encoder", "placement": "cpu", "bytes": 6 * GIB, "bytes_on_card": 0},
            {"name": "vae", "role": "vae", "placement": "gpu", "bytes": GIB // 4, "bytes_on_card": GIB // 4},
        ],
    }
]


@pytest.fixture(params=["dark", "light"])
def theme(session: Session, request: pytest.FixtureRequest) -> str:
    session.set_setting("Comfy.ColorPalette", request.param)
    expect(session.page.locator(BAR)).to_have_attribute("data-theme", request.param)
    return request.param


def violations(session: Session, selector: str) -> list[str]:
    """What axe-core finds serious or critical in one part of the page."""
    if not session.page.evaluate("() => Boolean(window.axe)"):
        session.page.add_script_tag(path=AXE)
    found: list[dict[str, Any]] = session.page.evaluate("async (s) => (await axe.run(s)).violations", selector)
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def mixed(pressure: float) -> dict[str, Any]:
    """Ours, reclaimable and others, so that every colour is there."""
    total = 16 * GIB
    held = int(total * pressure / 100)
    idle = min(3 * GIB, total - held)
    free = total - held - idle
    return card(
        pressure, used_bytes=held + idle, free_bytes=free, reclaimable_free_bytes=free + idle, others_bytes=min(GIB, held)
    )


CONTRAST = """(selector) => {
    const parts = (colour) => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (colour) => parts(colour)
        .map((value) => value / 255)
        .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const ratio = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05);
    };
    const bar = document.querySelector(selector);
    const style = getComputedStyle(bar);
    const colour = (query, property) => getComputedStyle(bar.querySelector(query))[property];
    const track = colour(".vrh-track", "backgroundColor");
    return {
        fill: ratio(colour("[data-kind=in-use]", "backgroundColor"), track),
        others: ratio(colour("[data-kind=others]", "backgroundColor"), track),
        icon: ratio(colour(".vrh-icon", "stroke"), style.backgroundColor),
        edge: ratio(colour(".vrh-track", "borderTopColor"), style.backgroundColor),
        text: ratio(style.color, style.backgroundColor),
    };
}"""


STATES = {"no-gpu": "no_gpu", "offline": "disconnected", "error": "error"}


def test_the_bar_in_every_state(session: Session, theme: str) -> None:
    page = session.page
    states: dict[str, Any] = {
        "35": status(mixed(35)),
        "72": status(mixed(72)),
        "85": status(mixed(85)),
        "93": status(mixed(93)),
        "old": status({**mixed(35), "stale": True, "age_seconds": 12.0}),
        "two": status(mixed(35), card(72, index=1)),
        "no-gpu": status(),
        "error": lambda route: route.fulfill(status=500, body="no"),
        "offline": abort,
    }
    ARTIFACTS.mkdir(exist_ok=True)
    for name, answer_of in states.items():
        bar = show(session, answer_of)
        expect(bar).to_have_attribute(
            "data-state", {"no-gpu": "no_gpu", "offline": "disconnected"}.get(name, name if name == "error" else "ok")
        )
        if name.isdigit():
            session.await_bar(pressure=name)
            ratios = page.evaluate(CONTRAST, BAR)
            assert ratios["text"] >= 4.5, (name, ratios)
            assert min(ratios[part] for part in ("fill", "others", "icon", "edge")) >= 3, (name, ratios)
        elif name == "old":
            expect(bar).to_have_attribute("data-stale", "true")
        elif name == "two":
            expect(bar).to_contain_text("GPU 1:")
        box = bar.bounding_box()
        assert box is not None
        clip = {"x": box["x"] - 10, "y": box["y"] - 8, "width": box["width"] + 20, "height": box["height"] + 16}
        page.screenshot(path=ARTIFACTS / f"bar-{name}-{theme}.png", clip=clip)  # pyright: ignore[reportArgumentType]
        assert violations(session, BAR) == [], name


@pytest.mark.parametrize("width", [480, 900, 1280, 1920])
def test_the_bar_in_its_menu_at_every_width(session: Session, theme: str, width: int) -> None:
    show(session, status(mixed(72), pipelines=PIPELINES))
    session.await_bar(pressure=72)
    session.page.set_viewport_size({"width": width, "height": 800})
    expect(session.page.locator(BAR)).to_be_in_viewport(ratio=1)
    expect(session.page.get_by_test_id("queue-button").first).to_be_in_viewport()
    with details(session) as panel:
        box = panel.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        session.shot(f"page-{width}-{theme}")
        assert violations(session, BAR) == []


@pytest.mark.parametrize("width", [480, 1280, 1920])
def test_the_question_at_every_width(session: Session, theme: str, width: int) -> None:
    session.page.route(CHECK, lambda route: route.fulfill(json=answer(*FIXES)))
    session.page.set_viewport_size({"width": width, "height": 800})
    session.queue()
    expect(session.question).to_have_attribute("data-theme", theme)
    box = session.question.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["height"] <= 800
    for name in ("Cancel", "Run anyway", "Apply and run"):
        expect(session.question.get_by_role("button", name=name, exact=True)).to_be_in_viewport(ratio=1)
    session.shot(f"question-{width}-{theme}")
    assert violations(session, QUESTION) == []
    session.question.locator("summary").click()
    session.question.locator(".vrh-models").scroll_into_view_if_needed()
    session.shot(f"question-{width}-{theme}-figures")
    assert violations(session, QUESTION) == []
    overflow = session.question.evaluate("(dialog) => dialog.scrollWidth - dialog.clientWidth")
    assert overflow <= 0


def test_the_question_is_reached_and_answered_by_keyboard_alone(session: Session) -> None:
    session.page.route(CHECK, lambda route: route.fulfill(json=answer(*FIXES)))
    session.queue()
    question = session.question
    expect(question.get_by_role("button", name="Cancel")).to_be_focused()
    seen: list[str] = []
    for _ in range(12):
        session.page.keyboard.press("Tab")
        seen.append(session.page.evaluate("() => document.activeElement.textContent || document.activeElement.type"))
        assert session.page.evaluate(
            f"() => document.activeElement.closest('{QUESTION}') !== null || document.activeElement === document.body"
        )
    assert {"radio", "checkbox", "All figures", "Copy diagnostics", "Run anyway", "Apply and run"} <= set(seen)
    question.get_by_role("radio").first.focus()
    session.page.keyboard.press("ArrowDown")
    expect(question.get_by_role("radio").nth(1)).to_be_checked()
    assert re.match("Phases of the run", question.get_by_role("list").get_attribute("aria-label") or "")


def test_nothing_of_ours_moves_by_itself(session: Session) -> None:
    show(session, status(mixed(72)))
    session.page.route(CHECK, lambda route: route.fulfill(json=answer(*FIXES)))
    session.queue()
    expect(session.question).to_be_visible()
    moving = session.page.evaluate(
        """([bar, question]) => [bar, question].flatMap((selector) => {
            const root = document.querySelector(selector);
            return [root, ...root.querySelectorAll("*")].filter((element) => {
                const style = getComputedStyle(element);
                const times = style.transitionDuration.split(",").map(parseFloat);
                return style.animationName !== "none" || times.some((time) => time > 0);
            }).map((element) => element.outerHTML.slice(0, 120));
        })""",
        [BAR, QUESTION],
    )
    assert moving == []
