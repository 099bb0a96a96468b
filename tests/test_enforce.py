"""`enforce`: a prompt that does not fit is refused for every client, in ComfyUI's own error shape, unless somebody insists."""

from collections.abc import Iterator
from typing import Any

import pytest
from client import history_of
from host.process import Answer, HostProcess, start_host
from prompts import official

CHECK = "/api/v1/hardware/vram/check"
OVERRIDE = "/api/v1/hardware/vram/override"
SETTING = "/settings/VRAMHeadroom.AskBeforeQueueing"
GIB = 1 << 30


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with start_host(vram_gb=4) as running:
        yield running


@pytest.fixture
def small_host(host: HostProcess) -> HostProcess:
    """A card that has no room for a video of 14B, and the mode as it is by default."""
    host.post("/_host/reset")
    host.post("/_host/others", {"bytes": 2 * GIB})
    host.post(SETTING, "warn")
    return host


def queue(host: HostProcess, prompt: dict[str, Any], headers: dict[str, str] | None = None, **extra: Any) -> Answer:
    body = {"prompt": prompt, "client_id": "test"}
    if extra:
        body["extra_data"] = {"vram_headroom": extra}
    return host.post("/prompt", body, headers)


def test_warn_queues_what_does_not_fit(small_host: HostProcess) -> None:
    prompt = official("video_wan2_2_14B_t2v")
    assert small_host.post(CHECK, prompt).body["verdict"] == "does_not_fit"
    answer = queue(small_host, prompt)
    assert answer.status == 200
    assert history_of(small_host.url, answer.body["prompt_id"])["status"]["status_str"] == "error"


def test_enforce_refuses_it_with_the_numbers_where_each_client_looks(small_host: HostProcess) -> None:
    small_host.post(SETTING, "enforce")
    prompt = official("video_wan2_2_14B_t2v")
    check = small_host.post(CHECK, prompt).body
    answer = queue(small_host, prompt)
    assert answer.status == 400
    error = answer.body["error"]
    assert (error["type"], error["message"]) == ("prompt_outputs_failed_validation", check["message"])
    assert error["extra_info"]["vram_headroom"]["plan_id"] == check["plan_id"]
    short = {phase["node_ids"][0]: phase for phase in check["phases"] if phase["short_bytes"]}
    assert set(answer.body["node_errors"]) == set(short) != set()
    for node_id, found in answer.body["node_errors"].items():
        (problem,) = found["errors"]
        assert problem["type"] == "custom_validation_failed"
        assert f"(node {node_id}) needs about" in problem["details"]
        assert problem["extra_info"]["short_bytes"] == short[node_id]["short_bytes"]
        assert found["class_type"] == prompt[node_id]["class_type"]
    assert small_host.get("/queue").body == {"queue_running": [], "queue_pending": []}


def test_enforce_lets_through_what_fits_and_what_it_cannot_tell(small_host: HostProcess) -> None:
    small_host.post(SETTING, "enforce")
    small_host.post("/_host/others", {"bytes": 0})
    for prompt in ({"1": {"class_type": "NoSuchNode", "inputs": {}}}, {}):
        answer = queue(small_host, prompt)
        assert answer.status == 400
        assert "vram_headroom" not in str(answer.body), "ComfyUI's own error"


@pytest.mark.parametrize("how", ["extra_data", "header", "once"])
def test_anybody_can_insist(small_host: HostProcess, how: str) -> None:
    small_host.post(SETTING, "enforce")
    prompt = official("video_wan2_2_14B_t2v")
    assert queue(small_host, prompt).status == 400
    if how == "once":
        assert small_host.post(OVERRIDE, {"prompt": prompt}).status == 204
        answer = queue(small_host, prompt)
    elif how == "header":
        answer = queue(small_host, prompt, {"VRAM-Headroom-Override": "true"})
    else:
        answer = queue(small_host, prompt, override=True)
    assert answer.status == 200
    history_of(small_host.url, answer.body["prompt_id"])
    assert queue(small_host, prompt).status == 400, "for that one post only"


def test_what_is_no_override_overrides_nothing(small_host: HostProcess) -> None:
    small_host.post(SETTING, "enforce")
    prompt = official("video_wan2_2_14B_t2v")
    assert queue(small_host, prompt, override="yes").status == 400
    assert queue(small_host, prompt, {"VRAM-Headroom-Override": "no"}).status == 400
    other = {**prompt, "99": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}}
    assert small_host.post(OVERRIDE, {"prompt": other}).status == 204
    assert queue(small_host, prompt).status == 400


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}]
)
def test_another_sites_page_cannot_insist(small_host: HostProcess, headers: dict[str, str]) -> None:
    small_host.post(SETTING, "enforce")
    prompt = official("video_wan2_2_14B_t2v")
    answer = small_host.post(OVERRIDE, {"prompt": prompt}, headers)
    assert (answer.status, answer.body["error"]["type"]) == (403, "other_site")
    assert queue(small_host, prompt).status == 400


def test_off_checks_nothing_when_queueing(small_host: HostProcess) -> None:
    small_host.post(SETTING, "off")
    answer = queue(small_host, official("video_wan2_2_14B_t2v"))
    assert answer.status == 200
    entry = history_of(small_host.url, answer.body["prompt_id"])
    assert "vram_headroom" not in entry["prompt"][3]


def test_the_margin_that_a_person_chose_is_kept_free(small_host: HostProcess) -> None:
    setting = "/settings/VRAMHeadroom.SafetyMarginGB"
    small_host.post("/_host/others", {"bytes": 0})
    prompt = official("text_to_video_wan")
    try:
        plain = small_host.post(CHECK, prompt).body
        small_host.post(setting, 3.9)
        kept = small_host.post(CHECK, prompt).body
        assert (plain["fits"], kept["fits"]) == (True, False)
        for nonsense in ("a lot", -1, 1e9, None):
            small_host.post(setting, nonsense)
            assert small_host.post(CHECK, prompt).body["verdict"] == plain["verdict"]
    finally:
        small_host.post(setting, None)
