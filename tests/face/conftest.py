"""One browser for all of this folder, one small card, and one page on it that tests leave as they found it."""

from collections.abc import Iterator

import pytest
from chromium import chromium
from host.process import HostProcess, start_host
from panels import close_panel, open_panel, running, serve
from playwright.sync_api import Browser, Locator
from session import Session

TEMPLATE = "text_to_video_wan"


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="package")
def host() -> Iterator[HostProcess]:
    """1 GiB: no WAN graph fits. Badges, which ask for plans by themselves, are switched on by their own tests."""
    with start_host(vram_gb=1, template="") as running:
        running.post("/api/settings/VRAMHeadroom.NodeBadges", False)
        yield running


@pytest.fixture(scope="package")
def shared(host: HostProcess, browser: Browser) -> Iterator[Session]:
    opened = Session(host.url, browser, template=TEMPLATE)
    yield opened
    opened.page.close()


@pytest.fixture
def session(host: HostProcess, shared: Session) -> Iterator[Session]:
    """The shared page with the official workflow as it comes, nothing queued, asked or remembered. Prompts do not run."""
    shared.begin(TEMPLATE)
    shared.swallow_prompts()
    yield shared
    host.post("/queue", {"clear": True})
    host.post("/interrupt")
    host.get("/_host/idle?timeout=30")
    host.post("/_host/others", {"bytes": 0})
    shared.end()
    told = [message[0] for entry in host.get("/history").body.values() for message in entry["status"]["messages"]]
    if "execution_error" in told:
        # a page that has heard of it may be about to say so, in the middle of the next test
        host.post("/history", {"clear": True})
        shared.reload()


@pytest.fixture
def panel(session: Session) -> Iterator[Locator]:
    """Open, on a card in the middle of a run."""
    serve(session, running())
    yield open_panel(session)
    close_panel(session)
