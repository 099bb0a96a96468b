"""Each seam switched off, and absent, in turn: prompts run as before, the status names it, what its row says is lost.

And a second pack that wraps the same places, loaded before ours and after.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from client import history_of
from host.lab import write_tiny_models
from host.process import start_host
from insidehost import ask_inside
from prompts import official, with_our_loaders

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="one stand-in is forked for each seam")

STATUS, CHECK = "/api/v1/hardware/vram", "/api/v1/hardware/vram/check"

PAGES = "pages of DynamicVRAM"

NO_POLICY = {"text encoder left before sampling": False}

NO_WHOLE = {"decode is done whole again": False}

LOST: Mapping[str, Mapping[str, Any]] = {
    "routes": {"routes": 0},
    "check before queueing": {"middlewares": 0},
    "prompt handler": {"handlers": 0},
    "prompt start and end": {"running node shown": False, "in use while it runs": False, "peaks": False, **NO_POLICY},
    "node start and end": {"running node shown": False, "peaks": False, **NO_POLICY},
    "loading of models": NO_POLICY,
    "choice of who leaves the card": {"pinned stays": False},
    "websocket events": {"told over the websocket": False},
    "idle queue": {"done when idle": False, "leaves once the queue is empty": False},
    "length of the queue": {"leaves once the queue is empty": False},
    "start of a sampling": {"step is tried again": False},
    "tiled VAE decode": {"tiles noticed": False, **NO_WHOLE},
    "tiled VAE encode": NO_WHOLE,
    "decode and encode of VAEs": NO_WHOLE,
    "text and vision encoders": {"text is encoded again": False},
    "nodes that expand": {"pipeline": "error"},
    PAGES: {"total of pages": False},
    "list of loaded models": {"loaded models seen": False, "in use while it runs": False, **NO_POLICY},
    "ComfyUI's memory reading": {"cards": 0},
    "file of a loaded model": {"files of stock loaders": 0},
    "results of the last run": {},
    "prompts that wait": {"prompts that wait": 0},
    "user settings": {},
}
"""What differs from a pack with all seams. What the last run left can only be seen in a real ComfyUI (tests/real), and settings
only with a browser's request (tests/test_enforce.py)."""

TOGETHER = frozenset({"prompt start and end", "results of the last run"})
"""Both hold on to `PromptExecutor.execute`: where one is absent, so is the other."""

CASES = [(seam, how) for seam in LOST for how in ("off", "absent")]
PLAIN = [("", "plain"), (PAGES, "plain")]
ORDERS = [("before", "other"), ("after", "other")]

Seen = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    base = tmp_path_factory.mktemp("seams")
    write_tiny_models(base / "models")
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True)
    return look(base)


def look(base: Path) -> Seen:
    cases = [*PLAIN, *CASES, *ORDERS]
    script = f"from host.inside.seamlab import every\nanswer(every({cases!r}))"
    return dict(zip(cases, ask_inside(script, base, pack=False, seconds=300), strict=True))


def without_failure(found: dict[str, Any]) -> dict[str, Any]:
    assert "failed" not in found, found["failed"]
    return found


def test_with_all_seams_nothing_is_lost(seen: Seen) -> None:
    found = without_failure(seen["", "plain"])
    # settings are asked for by a request, pages are there with DynamicVRAM only
    # the wait of an idle worker is looked at in tests/test_host_parts.py
    assert set(found["seams"]) == (set(LOST) | {"waiting queue"}) - {PAGES}
    assert set(found["seams"].values()) == {"live"}
    assert PAGES in without_failure(seen[PAGES, "plain"])["seams"]
    assert seen[PAGES, "plain"]["total of pages"] is True
    for lost in LOST.values():
        for what, value in lost.items():
            assert what == "total of pages" or found[what] != value, what


@pytest.mark.parametrize(("seam", "how"), CASES)
def test_without_one_seam_prompts_run_and_what_its_row_says_is_lost(seen: Seen, seam: str, how: str) -> None:
    found, whole = without_failure(seen[seam, how]), seen[PAGES if seam == PAGES else "", "plain"]
    assert (found["status"], found["traceback"]) == ("success", [])
    away = TOGETHER if seam in TOGETHER and how == "absent" else {seam}
    assert {name: state for name, state in found["seams"].items() if state != "live"} == dict.fromkeys(away, how)
    lost = {what: value for one in away for what, value in LOST[one].items()}
    compared = (set(whole) & set(found)) - {"seams"}
    assert {what: found[what] for what in compared if found[what] != whole[what]} == lost


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_pack_that_wraps_the_same_places_sees_each_call_once_and_so_do_we(seen: Seen, order: str) -> None:
    found = without_failure(seen[order, "other"])
    assert (found["status"], found["traceback"]) == ("success", [])
    assert found["ours"] == found["theirs"]
    assert found["ours"]["get_output_data"] == found["nodes run"]
    assert (found["ours"]["execute"], found["ours"]["decode_tiled_3d"]) == (1, 1)
    assert found["ours"]["free_memory"] > 0 < found["ours"]["load_models_gpu"]
    assert set(found["seams"].values()) == {"live"}
    assert (found["pinned stays"], found["text encoder left before sampling"]) == (True, True)


def test_the_status_route_names_what_is_off_and_the_check_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    off = ("prompt handler", "list of loaded models")
    monkeypatch.setenv("VRAM_HEADROOM_SEAMS_OFF", f"nothing of that name, {', '.join(off)}")
    with start_host(vram_gb=16) as host:
        queued = host.post("/prompt", {"prompt": with_our_loaders(official("text_to_video_wan")), "client_id": "test"})
        entry = history_of(host.url, queued.body["prompt_id"])
        assert entry["status"]["status_str"] == "success"
        seams = {found["name"]: found["state"] for found in host.get(STATUS).body["seams"]}
        assert {name for name, state in seams.items() if state == "off"} == set(off)
        assert {state for name, state in seams.items() if name not in off} == {"live"}
        # what the first run left on the card counts as another program's
        assert host.post(CHECK, official("text_to_video_wan")).body["verdict"] == "fits_with_offload"
        assert "vram_headroom" not in entry["prompt"][3]
        assert "Traceback" not in host.log_text()


def test_without_routes_nothing_answers_and_prompts_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAM_HEADROOM_SEAMS_OFF", "routes")
    with start_host(vram_gb=16) as host:
        assert host.get(STATUS).status == 404
        queued = host.post("/prompt", {"prompt": official("text_to_video_wan"), "client_id": "test"})
        assert history_of(host.url, queued.body["prompt_id"])["status"]["status_str"] == "success"
        assert "routes is switched off" in host.log_text()
