"""The pack's nodes inside a real ComfyUI on a simulated card: equal pictures, pins, policies, one component per model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
from client import history_of
from PIL import Image
from prompts import OUR_LOADERS, with_our_loaders
from real_comfyui import STATUS, RealComfyUI

OURS = "VRAMHeadroom"
PROMPTS = Path(__file__).parent / "data" / "prompts.json"
NAMES = ("t2v", "i2v", "two_experts")
Prompt = dict[str, dict[str, Any]]


@pytest.fixture
def prompts(two_stage: Prompt) -> dict[str, Prompt]:
    """With the text encoder that this ComfyUI can load."""
    clip = next(one["inputs"]["clip_name"] for one in two_stage.values() if one["class_type"] == "CLIPLoader")
    return {name: with_input(prompt, "2", clip_name=clip) for name, prompt in json.loads(PROMPTS.read_text("utf-8")).items()}


@pytest.fixture(autouse=True)
def emptied(comfyui: RealComfyUI) -> None:
    """Nothing cached and nothing loaded: ComfyUI does as the flags say before its next prompt."""
    post(comfyui, "/free", {"unload_models": True, "free_memory": True})
    picture = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    run(comfyui, {"1": picture, "2": node("PreviewImage", images=["1", 0])})


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def post(comfyui: RealComfyUI, path: str, body: Any) -> None:
    headers = {"Content-Type": "application/json"}
    urlopen(Request(comfyui.url + path, data=json.dumps(body).encode(), headers=headers), timeout=60).close()


def run(comfyui: RealComfyUI, prompt: Prompt, status: str = "success") -> dict[str, Any]:
    code, queued = comfyui.ask("/prompt", {"prompt": prompt, "client_id": "test"})
    assert code == 200, queued
    entry = history_of(comfyui.url, queued["prompt_id"])
    assert entry["status"]["status_str"] == status, entry["status"]["messages"]
    return entry


def pictures(comfyui: RealComfyUI, entry: dict[str, Any], node_id: str = "10") -> list[bytes]:
    """Pixels: the files hold the prompt as well."""
    found = []
    for image in entry["outputs"][node_id]["images"]:
        with urlopen(f"{comfyui.url}/view?{urlencode(image)}", timeout=60) as answer:
            found.append(Image.open(io.BytesIO(answer.read())).tobytes())
    return found


def components(comfyui: RealComfyUI) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for pipeline in comfyui.ask(STATUS)[1]["pipelines"] for c in pipeline["components"]}


def with_input(prompt: Prompt, node_id: str, **inputs: Any) -> Prompt:
    return {**prompt, node_id: {**prompt[node_id], "inputs": {**prompt[node_id]["inputs"], **inputs}}}


def through(prompt: Prompt, source: list[Any], to: list[Any]) -> Prompt:
    """Every input that is linked to `source` is linked to `to`."""
    return {
        name: {**one, "inputs": {key: to if value == source else value for key, value in one["inputs"].items()}}
        for name, one in prompt.items()
    }


def message_of(entry: dict[str, Any]) -> str:
    return next(data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error")


@pytest.mark.parametrize("name", NAMES)
def test_our_nodes_make_the_stock_nodes_picture_to_the_last_bit(
    comfyui: RealComfyUI, prompts: dict[str, Prompt], name: str
) -> None:
    stock = pictures(comfyui, run(comfyui, prompts[name]))
    ours = with_our_loaders(prompts[name])
    decode = next(key for key, value in ours.items() if value["class_type"] == "VAEDecode")
    ours[decode] = {**ours[decode], "class_type": f"{OURS}VAEDecode"}
    assert pictures(comfyui, run(comfyui, ours)) == stock
    assert len(stock) == 5


def test_the_pipeline_loader_expands_and_reloads_one_file(comfyui: RealComfyUI, prompts: dict[str, Prompt]) -> None:
    stock = prompts["two_experts"]
    expected = pictures(comfyui, run(comfyui, stock))
    inputs = {
        "high_noise_model": stock["1"]["inputs"]["unet_name"],
        "low_noise_model": stock["21"]["inputs"]["unet_name"],
        "weight_dtype": "default",
        "text_encoder": stock["2"]["inputs"]["clip_name"],
        "vae": stock["3"]["inputs"]["vae_name"],
        "clip_vision": "none",
    }
    prompt = stock
    for source, slot in (("1", 0), ("21", 1), ("2", 2), ("3", 3)):
        prompt = through(prompt, [source, 0], ["50", slot])
    prompt = {name: one for name, one in prompt.items() if name not in ("1", "21", "2", "3")}
    prompt["50"] = node(f"{OURS}LoadPipeline", **inputs)
    assert pictures(comfyui, run(comfyui, prompt)) == expected
    assert set(components(comfyui)) == {
        inputs["high_noise_model"],
        inputs["low_noise_model"],
        inputs["text_encoder"],
        inputs["vae"],
    }
    before = len(comfyui.log.read_text())
    run(comfyui, with_input(prompt, "50", low_noise_model="tiny_wan21_t2v_fp16.safetensors"))
    loaded = [line for line in comfyui.log.read_text()[before:].splitlines() if "model weight dtype" in line]
    assert len(loaded) == 1, "only the file that changed is loaded"


def test_a_pinned_vae_is_still_loaded_after_a_hungry_prompt(comfyui: RealComfyUI, prompts: dict[str, Prompt]) -> None:
    prompt = with_our_loaders(prompts["t2v"])
    prompt["50"] = node(f"{OURS}ComponentPolicy", policy="pinned to the card", priority=1, vae=["3", 0])
    prompt = with_input(prompt, "9", vae=["50", 2])
    run(comfyui, prompt)
    vae = prompt["3"]["inputs"]["vae_name"]
    size = components(comfyui)[vae]["bytes"]
    # beside what ComfyUI keeps free for any inference there is room for two of the three models
    post(comfyui, "/fake_gpu", {"total_mb": 1250})
    try:
        hungry = with_input(with_input(prompt, "8", seed=2), "4", text="another prompt")
        run(comfyui, hungry)
        post(comfyui, "/free", {"unload_models": True})
        # nothing of it runs again, and the flag was heeded before it
        run(comfyui, hungry)
        placed = {name: c["bytes_on_card"] for name, c in components(comfyui).items()}
    finally:
        post(comfyui, "/fake_gpu", {"total_mb": comfyui.vram_bytes >> 20})
    assert placed == {prompt["1"]["inputs"]["unet_name"]: 0, prompt["2"]["inputs"]["clip_name"]: 0, vae: size}


def test_the_text_encoder_has_left_before_sampling_when_the_policy_says_so(
    comfyui: RealComfyUI, prompts: dict[str, Prompt]
) -> None:
    prompt = with_our_loaders(prompts["t2v"])
    prompt["50"] = node(f"{OURS}ComponentPolicy", policy="leaves between uses", priority=1, clip=["2", 0])
    for name in ("4", "5"):
        prompt = with_input(prompt, name, clip=["50", 1])
    # looked at from inside the graph, between the sampler and the decode
    prompt["51"] = node(f"{OURS}Status", after=["8", 0])
    entry = run(comfyui, prompt)
    lines = entry["outputs"]["51"]["text"][0].splitlines()
    assert not [line for line in lines if prompt["2"]["inputs"]["clip_name"] in line]
    assert [line for line in lines if prompt["1"]["inputs"]["unet_name"] in line]
    assert components(comfyui)[prompt["2"]["inputs"]["clip_name"]]["placement"] == "cpu"


def test_a_model_cloned_by_lora_and_sampling_nodes_is_one_component(comfyui: RealComfyUI, prompts: dict[str, Prompt]) -> None:
    prompt = with_our_loaders(prompts["t2v"])
    prompt["52"] = node("ModelSamplingSD3", model=["7", 0], shift=3.0)
    prompt["50"] = node(f"{OURS}RegisterModel", pipeline="wan", model=["52", 0])
    run(comfyui, with_input(prompt, "8", model=["50", 0]))
    generators = [name for name, c in components(comfyui).items() if c["role"] == "generator"]
    assert generators == [prompt["1"]["inputs"]["unet_name"]]
    assert "memory leak" not in comfyui.log.read_text().lower()


def test_models_of_stock_loaders_are_listed_with_their_role(comfyui: RealComfyUI, prompts: dict[str, Prompt]) -> None:
    run(comfyui, prompts["t2v"])
    listed = {model["role"]: model["registered"] for model in comfyui.ask(STATUS)[1]["loaded_models"]}
    assert listed == {"generator": False, "text_encoder": False, "vae": False}


def test_offload_now_and_the_gate_hand_on_and_never_make_the_sampler_run_again(
    comfyui: RealComfyUI, prompts: dict[str, Prompt]
) -> None:
    expected = pictures(comfyui, run(comfyui, prompts["t2v"]))
    prompt = with_our_loaders(prompts["t2v"])
    prompt["50"] = node(f"{OURS}Gate", value=["4", 0], if_it_does_not_fit="stop")
    prompt["51"] = node(f"{OURS}OffloadNow", value=["50", 0], what="text encoders")
    prompt = with_input(prompt, "8", positive=["51", 0])
    assert pictures(comfyui, run(comfyui, prompt)) == expected
    again = run(comfyui, prompt)
    cached = next(data["nodes"] for kind, data in again["status"]["messages"] if kind == "execution_cached")
    assert set(cached) == set(prompt)


def test_a_wrong_kind_of_model_is_refused_before_it_is_loaded(comfyui: RealComfyUI, prompts: dict[str, Prompt]) -> None:
    run(comfyui, prompts["t2v"])
    before = comfyui.ask(STATUS)[1]["loaded_models"]
    bad = node(OUR_LOADERS["UNETLoader"], unet_name="not_wan.safetensors", weight_dtype="default")
    prompt = {**prompts["t2v"], "60": bad, "61": node(f"{OURS}Status", after=["60", 0])}
    entry = run(comfyui, prompt, status="error")
    assert "not_wan.safetensors is" in message_of(entry)
    after = comfyui.ask(STATUS)[1]["loaded_models"]
    assert [(m["file"], m["bytes_on_card"]) for m in after] == [(m["file"], m["bytes_on_card"]) for m in before]
