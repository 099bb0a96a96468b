"""The pack inside a real ComfyUI on the CPU: what the stand-in must not be trusted for.

pytest tests/real --comfyui CHECKOUT --comfyui-python PYTHON --comfyui-models DIR --comfyui-fixtures DIR
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from client import history_of
from loadpack import ROOT
from prompts import OUR_LOADERS, with_our_loaders

EVENTS = ROOT / "tests" / "host" / "data" / "events.json"
STATUS, CHECK = "/v1/hardware/vram", "/v1/hardware/vram/check"
FAKE_VRAM_MB = 4000


class RealComfyUI(NamedTuple):
    url: str
    log: Path

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except HTTPError as error:
            return error.code, json.loads(error.read())


def start(config: pytest.Config, folder: Path, with_pack: bool, fake_vram_mb: int = 0) -> Iterator[RealComfyUI]:
    checkout = Path(str(config.getoption("--comfyui"))).resolve()
    nodes = folder / "custom_nodes"
    nodes.mkdir()
    if with_pack:
        (nodes / "vram-headroom").symlink_to(ROOT, target_is_directory=True)
    fixtures = config.getoption("--comfyui-fixtures")
    for fixture in sorted(Path(str(fixtures)).iterdir()) if fixtures else []:
        (nodes / fixture.name).symlink_to(fixture.resolve(), target_is_directory=True)
    models = Path(str(config.getoption("--comfyui-models"))).resolve()
    lines = [f"{name}: {models / name}" for name in ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")]
    paths = folder / "paths.yaml"
    paths.write_text("\n  ".join(["lab:", *lines, f"custom_nodes: {nodes}"]) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(config.getoption("--comfyui-python") or sys.executable), "main.py", "--cpu", "--port", str(port)]
    command += ["--listen", "127.0.0.1", "--disable-auto-launch", "--extra-model-paths-config", str(paths)]
    for kind in ("output", "temp", "user"):
        command += [f"--{kind}-directory", str(folder)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    environment = {**os.environ, **({"FAKE_VRAM_MB": str(fake_vram_mb)} if fake_vram_mb else {})}
    log = folder / "log.txt"
    up = threading.Event()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def follow() -> None:
        with log.open("w") as out:
            for line in process.stdout or ():
                out.write(line)
                out.flush()
                if "To see the GUI go to" in line:
                    up.set()
        up.set()

    threading.Thread(target=follow, daemon=True).start()
    up.wait(120)
    try:
        assert process.poll() is None, log.read_text()
        yield RealComfyUI(f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def comfyui(request: pytest.FixtureRequest) -> Iterator[RealComfyUI]:
    with tempfile.TemporaryDirectory() as folder:
        yield from start(request.config, Path(folder), with_pack=True, fake_vram_mb=FAKE_VRAM_MB)


@pytest.fixture(scope="module")
def without_pack(request: pytest.FixtureRequest) -> Iterator[RealComfyUI]:
    with tempfile.TemporaryDirectory() as folder:
        yield from start(request.config, Path(folder), with_pack=False)


@pytest.fixture
def two_stage(comfyui: RealComfyUI) -> dict[str, Any]:
    """The two-expert prompt that this ComfyUI was recorded with."""
    version = comfyui.ask(STATUS)[1]["host"]["comfyui_version"]
    prompts = json.loads(EVENTS.read_text(encoding="utf-8"))[version]["prompts"]
    return next(prompt for name, prompt in prompts.items() if "two_stage" in name)


def test_the_pack_imports_with_no_warning(comfyui: RealComfyUI) -> None:
    log = comfyui.log.read_text()
    assert re.search(r"seconds: .*vram-headroom", log)
    assert "IMPORT FAILED" not in log
    ours = [line for line in log.splitlines() if "headroom" in line.lower() and re.search("warn|error|trace", line, re.I)]
    assert ours == []


def test_the_nodes_are_in_object_info_with_the_stock_inputs(comfyui: RealComfyUI) -> None:
    for stock, ours in OUR_LOADERS.items():
        expected = comfyui.ask(f"/object_info/{stock}")[1][stock]
        found = comfyui.ask(f"/object_info/{ours}")[1][ours]
        assert found["output"] == expected["output"]
        assert list(found["input"]["required"]) == list(expected["input"]["required"])
        assert set(found["input"]["optional"]) == {*expected["input"].get("optional", {}), "pipeline"}


def test_the_extension_is_served(comfyui: RealComfyUI) -> None:
    extensions = comfyui.ask("/extensions")[1]
    assert extensions.count("/extensions/vram-headroom/vram_headroom.js") == 1


def test_both_routes_answer_below_both_prefixes(comfyui: RealComfyUI, two_stage: dict[str, Any]) -> None:
    for prefix in ("", "/api"):
        status, body = comfyui.ask(prefix + STATUS)
        assert (status, body["devices"][0]["total_bytes"]) == (200, FAKE_VRAM_MB << 20)
        assert {seam["state"] for seam in body["seams"]} == {"live"}
        status, body = comfyui.ask(prefix + CHECK, {"prompt": two_stage})
        assert (status, body["verdict"]) == (200, "fits")
        assert [phase["kind"] for phase in body["phases"]].count("sample") == 2


def test_two_experts_run_with_our_loaders_and_a_second_time_nothing_runs(
    comfyui: RealComfyUI, two_stage: dict[str, Any]
) -> None:
    prompt = with_our_loaders(two_stage)
    plan = comfyui.ask(CHECK, {"prompt": prompt})[1]
    for turn in range(2):
        status, queued = comfyui.ask("/prompt", {"prompt": prompt, "client_id": "test"})
        assert status == 200, queued
        entry = history_of(comfyui.url, queued["prompt_id"])
        assert entry["status"]["status_str"] == "success"
        assert entry["prompt"][3]["vram_headroom"]["verdict"] == "fits"
        cached = next(message[1]["nodes"] for message in entry["status"]["messages"] if message[0] == "execution_cached")
        assert sorted(cached) == ([] if turn == 0 else sorted(prompt))
    (pipeline,) = comfyui.ask(STATUS)[1]["pipelines"]
    # the lab's tiny text encoder holds one tensor that its model has no place for
    sizes = {c["name"]: c["bytes_on_card"] for c in pipeline["components"] if c["role"] != "text_encoder"}
    assert sizes == {m["file"]: m["resident_bytes"] for m in plan["models"] if m["role"] != "text_encoder"}
    assert {component["placement"] for component in pipeline["components"]} == {"gpu"}


def test_registering_keeps_no_model_alive(comfyui: RealComfyUI, two_stage: dict[str, Any]) -> None:
    queued = comfyui.ask("/prompt", {"prompt": with_our_loaders(two_stage), "client_id": "test"})[1]
    history_of(comfyui.url, queued["prompt_id"])
    assert comfyui.ask(STATUS)[1]["pipelines"]
    urlopen(
        Request(
            comfyui.url + "/free",
            data=b'{"unload_models": true, "free_memory": true}',
            headers={"Content-Type": "application/json"},
        ),
        timeout=60,
    ).close()
    # the flags are drained by the worker before its next prompt
    tiny = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}}
    tiny["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    history_of(comfyui.url, comfyui.ask("/prompt", {"prompt": tiny, "client_id": "test"})[1]["prompt_id"])
    assert comfyui.ask(STATUS)[1]["pipelines"] == []
    assert "memory leak" not in comfyui.log.read_text().lower()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}},
        {"prompt": {"1": {"class_type": "KSampler", "inputs": {}}}},
        {"prompt": {"1": {"inputs": {}}}},
        {"no": "prompt"},
    ],
)
def test_a_bad_prompt_gets_comfyuis_own_error(comfyui: RealComfyUI, without_pack: RealComfyUI, body: dict[str, Any]) -> None:
    assert comfyui.ask("/prompt", body) == without_pack.ask("/prompt", body)
