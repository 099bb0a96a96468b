"""The bar and the question in another language: every sentence is marked, so what stands there unmarked was not translated."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from host.process import HostProcess
from panels import running, serve
from playwright.sync_api import expect
from session import BAR, QUESTION, Session

ENGLISH = Path(__file__).parents[2] / "locales" / "en" / "main.json"
TEMPLATE = "text_to_video_wan"

ABOUT = """() => {
    const ours = window.comfyAPI.app.app.extensions.find((one) => one.name === "VRAMHeadroom");
    return ours.aboutPageBadges[0].label;
}"""


@pytest.fixture
def marked(host: HostProcess, session: Session) -> Iterator[Session]:
    """The page in French, where every sentence of ours is the English one behind a mark."""
    sentences = json.loads(ENGLISH.read_text(encoding="utf-8"))["vramHeadroom"]
    french = {key: f"¤{sentence}" for key, sentence in sentences.items()}
    session.page.route("**/api/i18n", lambda route: route.fulfill(json={"fr": {"vramHeadroom": french}}))
    speak(host, session, "fr")
    yield session
    speak(host, session, "en")


def speak(host: HostProcess, session: Session, locale: str) -> None:
    host.post("/api/settings/Comfy.Locale", locale)
    session.page.reload()
    expect(session.page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)


def test_the_bar_its_details_and_the_about_page_are_translated(marked: Session) -> None:
    serve(marked, running(loaded_models=[]))
    bar = marked.page.locator(BAR)
    expect(bar.get_by_role("meter")).to_have_attribute("aria-label", "¤VRAM pressure")
    expect(bar.locator(".vrh-amount")).to_contain_text("¤")
    button = marked.page.get_by_role("button", name="¤VRAM details", exact=True)
    button.focus()
    marked.page.keyboard.press("Enter")
    details = marked.page.get_by_role("group", name="¤VRAM details", exact=True)
    expect(details.locator("dt").first).to_have_text("¤Pressure")
    labels = details.locator("dt, .vrh-legend span").all_inner_texts()
    assert len(labels) > 9
    assert [label for label in labels if not label.startswith("¤")] == []
    marked.page.keyboard.press("Escape")
    assert marked.page.evaluate(ABOUT) == "¤VRAM Headroom: what it sees now"


def test_the_question_is_translated_but_for_what_the_server_says(marked: Session) -> None:
    marked.open(TEMPLATE)
    marked.queue()
    question = marked.page.locator(QUESTION)
    expect(question.get_by_role("heading", level=1)).to_contain_text("¤")
    question.locator("summary").click()
    ours = "button, label:not(.vrh-fix), legend, summary, caption, thead th, figcaption span, .vrh-assumptions > p"
    words = question.locator(ours).all_inner_texts()
    assert len(words) > 15
    assert [word for word in words if not word.startswith("¤")] == []
    question.get_by_role("button", name="¤Cancel", exact=True).click()
    expect(question).to_be_hidden()
