"""The pack inside a real ComfyUI on the CPU: what the stand-in must not be trusted for.

pytest tests/real --comfyui CHECKOUT --comfyui-python PYTHON --comfyui-models DIR --comfyui-fixtures DIR
"""

import re
from typing import Any
from urllib.request import Request, urlopen

import pytest
from client import history_of
from prompts import OUR_LOADERS, with_our_loaders
from real_comfyui import CHECK, STATUS, RealComfyUI


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
        assert (status, body["devices"][0]["total_bytes"]) == (200, comfyui.vram_bytes)
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


def test_what_comfyui_still_has_from_its_last_run_is_not_charged(comfyui: RealComfyUI, two_stage: dict[str, Any]) -> None:
    def phases(prompt: dict[str, Any]) -> list[str]:
        return [phase["kind"] for phase in comfyui.ask(CHECK, {"prompt": prompt})[1]["phases"]]

    prompt = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in two_stage.items()}
    samplers = [node_id for node_id, node in prompt.items() if node["class_type"] == "KSamplerAdvanced"]
    prompt[samplers[0]]["inputs"]["noise_seed"] = 4711
    history_of(comfyui.url, comfyui.ask("/prompt", {"prompt": prompt, "client_id": "test"})[1]["prompt_id"])
    answer = comfyui.ask(CHECK, {"prompt": prompt})[1]
    assert (answer["phases"], answer["verdict"]) == ([], "fits")
    prompt[samplers[0]]["inputs"]["noise_seed"] = 4712
    assert sorted(phases(prompt)) == ["sample", "sample", "vae_decode"]


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
    again = comfyui.ask(CHECK, {"prompt": two_stage})[1]
    assert [phase["kind"] for phase in again["phases"]].count("text_encode") == 2, "nothing is kept, all is charged"
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
