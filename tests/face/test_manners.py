"""The question's manners in real Chromium: it never stands in the way, never asks twice, never asks a machine."""

import time

import pytest
from host.process import HostProcess
from playwright.sync_api import Browser, Response, Route, expect
from session import BAR, CHECK, QUESTION, Session


def test_a_batch_is_asked_about_once_and_run_anyway_queues_all_of_it(session: Session) -> None:
    session.queue(3)
    seen: list[str] = []

    def is_third(response: Response) -> bool:
        if response.url.endswith("/api/prompt"):
            seen.append(response.url)
        return len(seen) == 3

    with session.page.expect_response(is_third):
        session.question.get_by_role("button", name="Run anyway").click()
    assert session.posted == 3
    assert session.checks == 1


def test_a_cancelled_batch_posts_nothing(session: Session) -> None:
    session.queue(3)
    session.page.locator(QUESTION).get_by_role("button", name="Cancel").click()
    expect(session.page.locator(QUESTION)).to_be_hidden()
    session.wait_until_settled()
    assert session.posted == 0
    assert session.page.get_by_role("dialog").count() == 0


def test_ctrl_enter_behind_the_question_queues_nothing(session: Session) -> None:
    session.queue()
    expect(session.page.locator(QUESTION)).to_be_visible()
    session.page.keyboard.press("Control+Enter")
    session.page.keyboard.press("Escape")
    expect(session.page.locator(QUESTION)).to_be_hidden()
    assert session.posted == 0
    assert session.checks == 1


def test_auto_queue_never_meets_a_dialog(session: Session) -> None:
    with session.page.expect_response(lambda response: response.url.endswith("/api/prompt")):
        session.queue(trigger="auto_queue")
    expect(session.toast("Short by")).to_be_visible()
    expect(session.page.locator(QUESTION)).to_be_hidden()


@pytest.mark.parametrize("status", [404, 500])
def test_a_check_that_fails_lets_the_prompt_through(session: Session, status: int) -> None:
    session.page.route(CHECK, lambda route: route.fulfill(status=status, body="no"))
    session.press(session.queue)
    expect(session.page.locator(QUESTION)).to_be_hidden()


def test_a_check_of_another_shape_lets_the_prompt_through(session: Session) -> None:
    session.page.route(CHECK, lambda route: route.fulfill(json={"verdict": ["does_not_fit"], "message": 5}))
    session.press(session.queue)
    expect(session.page.locator(QUESTION)).to_be_hidden()


def test_a_check_that_hangs_lets_the_prompt_through_after_a_second_and_a_half(session: Session) -> None:
    held: list[Route] = []
    session.page.route(CHECK, lambda route: held.append(route))
    started = time.monotonic()
    session.press(session.queue)
    assert 1.4 < time.monotonic() - started < 5.0
    assert len(held) == 1
    expect(session.page.locator(QUESTION)).to_be_hidden()


def test_the_pack_adds_nothing_to_the_console(host: HostProcess, browser: Browser) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(host.url)
    expect(page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)
    page.close()
    assert [line for line in said if "headroom" in line.lower() or "vram" in line.lower()] == []
