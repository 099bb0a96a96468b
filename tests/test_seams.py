"""Each seam switched off in turn: ComfyUI works as before, and the status says what is lost."""

import pytest
from client import history_of
from host.process import start_host
from prompts import official, with_our_loaders

STATUS, CHECK = "/api/v1/hardware/vram", "/api/v1/hardware/vram/check"

SEAMS = (
    "check before queueing",
    "prompt handler",
    "prompt start and end",
    "node start and end",
    "list of loaded models",
    "ComfyUI's memory reading",
    "file of a loaded model",
)


VERDICT_WITHOUT = {
    "ComfyUI's memory reading": "unknown",
    # what the first run left on the card then counts as another program's
    "list of loaded models": "fits_with_offload",
}


@pytest.mark.parametrize("seam", SEAMS)
def test_without_one_seam_prompts_run_and_the_rest_answers(seam: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAM_HEADROOM_SEAMS_OFF", f"nothing of that name, {seam}")
    with start_host(vram_gb=16) as host:
        queued = host.post("/prompt", {"prompt": with_our_loaders(official("text_to_video_wan")), "client_id": "test"})
        entry = history_of(host.url, queued.body["prompt_id"])
        assert entry["status"]["status_str"] == "success"
        seams = {found["name"]: found["state"] for found in host.get(STATUS).body["seams"]}
        assert seams[seam] == "off"
        assert {state for name, state in seams.items() if name != seam} == {"live"}
        verdict = host.post(CHECK, official("text_to_video_wan")).body["verdict"]
        assert verdict == VERDICT_WITHOUT.get(seam, "fits")
        attached = "vram_headroom" in entry["prompt"][3]
        assert attached == (seam not in ("check before queueing", "prompt handler"))
        assert "Traceback" not in host.log_text()


def test_without_routes_nothing_answers_and_prompts_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAM_HEADROOM_SEAMS_OFF", "routes")
    with start_host(vram_gb=16) as host:
        assert host.get(STATUS).status == 404
        queued = host.post("/prompt", {"prompt": official("text_to_video_wan"), "client_id": "test"})
        assert history_of(host.url, queued.body["prompt_id"])["status"]["status_str"] == "success"
        assert "routes is switched off" in host.log_text()
