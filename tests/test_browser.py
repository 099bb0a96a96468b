"""The whole path in real Chromium and the real front end: see the bar, press Run, answer the question, watch it run."""

import json
import re
from collections.abc import Callable, Iterator

import pytest
from chromium import chromium
from client import history_of
from host.process import HostProcess, start_host
from host.record.record_prompts import RECORDED, export
from playwright.sync_api import Browser, expect
from prompts import official
from session import BAR, QUESTION, Session

GIB = 1 << 30

SAMPLERS = {"video_wan2_2_14B_t2v": "128:81", "text_to_video_wan": "3"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[HostProcess]:
    """A stand-in host of (GiB of VRAM, template on the canvas)."""
    vram_gb, template = request.param
    with start_host(vram_gb=vram_gb, template=template) as running:
        yield running


@pytest.fixture
def session(host: HostProcess, browser: Browser) -> Iterator[Session]:
    opened = Session(host.url, browser)
    yield opened
    opened.page.close()


def run_and_watch(host: HostProcess, session: Session, name: str, sampler: str, said: Callable[[], None]) -> None:
    """Press Run and follow it to its end, reading the bar before, during and after."""
    assert (session.used(), session.bar("pressure")) == (0, "0")
    host.post("/_host/hold", {"node_id": sampler, "step": 3})
    prompt_id = session.press(session.run)
    said()
    host.get("/_host/held?timeout=60")
    status = host.get("/api/v1/hardware/vram").body
    assert status["running"]["node_id"] == sampler
    during = status["devices"][0]
    session.await_bar(used_bytes=during["used_bytes"], pressure=int(during["pressure_percent"]))
    session.shot(f"{name}-running")
    host.post("/_host/release")
    entry = history_of(host.url, prompt_id)
    assert entry["status"]["status_str"] == "success", entry["status"]
    # what is idle can be given back, and stays loaded until somebody needs the room
    session.await_bar(pressure=0)
    assert during["used_bytes"] > GIB
    assert session.used() > 0
    session.shot(f"{name}-after")


@pytest.mark.parametrize(
    ("host", "template"),
    [((16, "video_wan2_2_14B_t2v"), "video_wan2_2_14B_t2v")],
    indirect=["host"],
)
def test_on_16_gb_a_quiet_toast_says_what_streams_and_it_runs(host: HostProcess, session: Session, template: str) -> None:
    def said() -> None:
        toast = session.toast("streams")
        expect(toast).to_be_visible()
        expect(toast).to_contain_text(re.compile(r"keeps [\d.]+ GB of 13\.3 GB on the card and streams [\d.]+ GB per step"))
        expect(session.page.locator(QUESTION)).to_be_hidden()

    run_and_watch(host, session, "16gb-14b", SAMPLERS[template], said)
    assert session.checks == 1


@pytest.mark.parametrize(
    ("host", "template", "name"),
    [
        ((96, "video_wan2_2_14B_t2v"), "video_wan2_2_14B_t2v", "96gb-14b"),
        ((16, "text_to_video_wan"), "text_to_video_wan", "16gb-1.3b"),
        ((96, "text_to_video_wan"), "text_to_video_wan", "96gb-1.3b"),
    ],
    indirect=["host"],
)
def test_what_fits_says_nothing_and_runs(host: HostProcess, session: Session, template: str, name: str) -> None:
    run_and_watch(host, session, name, SAMPLERS[template], said=lambda: None)
    assert session.bar("last-check") == "fits"
    expect(session.toast("streams")).to_have_count(0)
    expect(session.page.locator(QUESTION)).to_be_hidden()


@pytest.mark.parametrize("host", [(3, "video_wan2_2_14B_t2v"), (1, "text_to_video_wan")], indirect=True)
def test_on_a_card_too_small_the_question_opens_and_cancel_queues_nothing(host: HostProcess, session: Session) -> None:
    question = session.page.locator(QUESTION)
    session.run()
    expect(question).to_be_visible()
    expect(question).to_contain_text(re.compile(r"needs about [\d.]+ GB"))
    expect(question).to_contain_text(re.compile(r"Short by [\d.]+ GB"))
    expect(question.get_by_role("button", name="Cancel")).to_be_focused()
    session.shot("too-small-question")
    session.page.keyboard.press("Escape")
    expect(question).to_be_hidden()
    session.run()
    expect(question).to_be_visible()
    question.get_by_role("button", name="Cancel").click()
    expect(question).to_be_hidden()
    assert session.posted == 0
    assert host.get("/history").body == {}
    assert session.page.locator("[role=dialog]:visible").count() == 0


@pytest.mark.parametrize("host", [(3, "text_to_video_wan")], indirect=True)
def test_a_decode_that_falls_back_to_tiles_is_said_before_and_survives(host: HostProcess, session: Session) -> None:
    prompt_id = session.press(session.run)
    toast = session.toast("in tiles")
    expect(toast).to_be_visible()
    expect(toast).to_contain_text(re.compile(r"VAE decoding does not fit whole and is done in tiles of \d+ px"))
    entry = history_of(host.url, prompt_id)
    # the whole decode runs out of memory and ComfyUI's own tiled one does not, as was said
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["prompt"][3]["vram_headroom"]["verdict"] == "fits_with_offload"


@pytest.mark.parametrize("host", [(3, "video_wan2_2_14B_t2v")], indirect=True)
def test_run_anyway_queues_once_and_what_was_said_not_to_fit_runs_out_of_memory_and_is_helped(
    host: HostProcess, session: Session
) -> None:
    session.run()
    prompt_id = session.press(session.question.get_by_role("button", name="Run anyway").click)
    entry = history_of(host.url, prompt_id)
    assert session.posted == 1
    assert entry["prompt"][3]["vram_headroom"]["verdict"] == "does_not_fit"
    error = next(message[1] for message in entry["status"]["messages"] if message[0] == "execution_error")
    assert error["exception_type"] == "torch.OutOfMemoryError"
    assert error["node_id"] == "128:81"
    expect(session.question.get_by_role("heading")).to_have_text("KSamplerAdvanced (node 128:81) ran out of memory")
    expect(session.question).to_contain_text("ComfyUI reports: ")
    expect(session.question).to_contain_text("The check had said so. Sampling (high noise)")
    session.shot("ran-out-of-memory")
    prompt_id = session.press(session.question.get_by_role("button", name="Apply and run").click)
    assert history_of(host.url, prompt_id)["status"]["status_str"] == "success"
    assert session.question.count() == 0


def test_without_a_card_the_bar_says_so(browser: Browser) -> None:
    with start_host(vram_gb=0, template="text_to_video_wan") as host:
        page = browser.new_page()
        page.goto(host.url)
        expect(page.locator(BAR)).to_have_attribute("data-state", "no_gpu", timeout=30_000)
        expect(page.locator(BAR)).to_contain_text("No GPU")
        page.close()


def test_recorded_prompts_are_what_the_front_end_makes_today(browser: Browser) -> None:
    for name, template, turbo in RECORDED:
        with start_host(template=template) as host:
            assert export(browser, host.url, turbo) == official(name), json.dumps(name)
