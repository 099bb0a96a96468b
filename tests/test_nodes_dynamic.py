"""The pack on DynamicVRAM, in prompts on the stand-in's 16 GB card: what it promises of elastic weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host.checkpoints import write_official_models
from host.lab import Prompt, node, run_prompt, with_inputs
from host.process import HostProcess, start_host
from prompts import with_our_loaders
from test_host_dynamic import CLIP, GIB, HIGH, LOW, MIB, PACK, PAGE, SMALL, VAE, Held, model_of, official, pages, two_experts

STATUS = "/api/v1/hardware/vram"
OURS = "VRAMHeadroom"


@pytest.fixture(scope="module", params=["0.4.13", "0.6.0"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder: Path = tmp_path_factory.mktemp("models")
    write_official_models(folder, [HIGH, LOW, SMALL, CLIP, VAE])
    with start_host(16, models=folder, dynamic=True, aimdo=request.param, custom_nodes=[PACK]) as host:
        yield host


@pytest.fixture
def host(running: HostProcess) -> HostProcess:
    running.post("/_host/others", {"bytes": 0})
    running.post("/free", {"unload_models": True, "free_memory": True})
    assert running.get("/_host/idle").status == 200
    assert pages(running)["models"] == []
    return running


def ours(unet: str = SMALL, **sizes: Any) -> Prompt:
    return with_our_loaders(official(unet, **sizes))


def ruled(prompt: Prompt, policy: str, socket: str, loader: str) -> Prompt:
    """Every use of the loader's model goes through a policy node, 20."""
    slot = ["model", "clip", "vae"].index(socket)
    for name in list(prompt):
        for key, value in prompt[name]["inputs"].items():
            if value == [loader, 0]:
                prompt = with_inputs(prompt, name, **{key: ["20", slot]})
    prompt["20"] = node(f"{OURS}ComponentPolicy", policy=policy, priority=1, **{socket: [loader, 0]})
    return prompt


def components(host: HostProcess) -> dict[str, dict[str, Any]]:
    return {c["role"]: c for pipeline in host.get(STATUS).body["pipelines"] for c in pipeline["components"]}


def test_elastic_weights_are_comfyuis_own_affair_unless_somebody_says_otherwise(host: HostProcess) -> None:
    assert run_prompt(host, ours()).status == "success"
    found = components(host)
    assert {role: (c["elastic"], c["policy"]) for role, c in found.items()} == {
        "generator": (True, "the host decides"),
        "text_encoder": (True, "the host decides"),
        "vae": (True, "the host decides"),
    }
    assert all(c["bytes_on_card"] > 0 for c in found.values()), "nothing left though the queue is empty"


def test_only_the_worker_thread_asks_for_pages(host: HostProcess) -> None:
    held = Held(host, ours(), "8", 0)
    assert held.ran.status == "success"
    for _ in range(3):
        assert host.get(STATUS).status == 200
    touched = {call["thread"] for call in pages(host)["callers"] if call["method"] != "get_total_vram_usage"}
    assert touched == {"worker"}


def test_values_of_elastic_models_are_as_old_as_the_last_node(host: HostProcess) -> None:
    host.post("/_host/hold", {"node_id": "8", "step": 1})
    host.post("/prompt", {"prompt": ours(), "client_id": "test"})
    assert host.get("/_host/held").status == 200
    during = {model["role"]: model for model in host.get(STATUS).body["loaded_models"]}
    resident = model_of(pages(host), SMALL)["resident_bytes"]
    host.post("/_host/release")
    assert host.get("/_host/idle").status == 200
    after = {model["role"]: model for model in host.get(STATUS).body["loaded_models"]}
    assert resident > 0
    assert during["generator"]["bytes_on_card"] == 0, "its pages came in the node that still runs"
    assert after["generator"]["bytes_on_card"] >= resident
    assert after["generator"]["elastic"] is True
    assert after["generator"]["age_seconds"] >= 0


def test_pages_are_ours_and_not_another_programs(host: HostProcess) -> None:
    host.post("/_host/others", {"bytes": 2 * GIB})
    host.post("/_host/hold", {"node_id": "8", "step": 1})
    host.post("/prompt", {"prompt": ours(HIGH), "client_id": "test"})
    assert host.get("/_host/held").status == 200
    (device,) = host.get(STATUS).body["devices"]
    card = host.get("/_host/card").body
    host.post("/_host/release")
    assert host.get("/_host/idle").status == 200
    assert device["others_bytes"] == 2 * GIB
    assert device["ours_bytes"] == card["booked"]


def test_a_text_encoder_that_leaves_between_uses_keeps_its_copy_in_ram(host: HostProcess) -> None:
    """Only pages go: reading the disk again would cost more."""
    prompt = ruled(ours(), "leaves between uses", "clip", "2")
    held = Held(host, prompt, "8", 0)
    encoder = model_of(held.books, CLIP)
    assert encoder["resident_bytes"] == 0
    assert encoder["ram_bytes"] > 0
    read = encoder["read_from_file"]
    assert run_prompt(host, with_inputs(prompt, "4", text="another prompt")).status == "success"
    assert model_of(pages(host), CLIP)["read_from_file"] == read


def test_a_pinned_elastic_model_is_kept_while_the_plan_has_room(host: HostProcess) -> None:
    held = Held(host, ruled(ours(), "pinned to the card", "vae", "3"), "8", 1)
    # the VAE has no pages before its first use; the limit is set before each node and reset after it
    assert held.ran.status == "success"
    again = Held(host, with_inputs(ruled(ours(), "pinned to the card", "vae", "3"), "8", seed=2), "8", 1)
    kept = model_of(again.books, VAE)
    assert kept["watermark_limit"] * PAGE >= kept["resident_bytes"] > 0
    after = model_of(pages(host), VAE)
    assert after["watermark_limit"] == 0, "ComfyUI resets every limit after a node"


def test_a_pin_that_the_plan_has_no_room_for_is_dropped_and_said(host: HostProcess) -> None:
    """Both experts pinned do not fit beside a forward of 14B on 16 GB."""
    host.post("/_host/others", {"bytes": 1 * GIB})
    prompt = ruled(with_our_loaders(two_experts()), "pinned to the card", "model", "1")
    before = len(host.log_text())
    held = Held(host, prompt, "8", 0)
    assert held.ran.status == "success"
    assert model_of(held.books, HIGH)["watermark_limit"] == 0
    said = [line for line in host.log_text()[before:].splitlines() if "can't be kept on the card during this prompt" in line]
    assert len(said) == 1
    assert f"{HIGH}.safetensors" in said[0]


def test_offload_now_frees_pages_when_asked(host: HostProcess) -> None:
    prompt = ours()
    prompt["20"] = node(f"{OURS}OffloadNow", value=["8", 0], what="everything idle")
    assert run_prompt(host, with_inputs(prompt, "9", samples=["20", 0])).status == "success"
    assert model_of(pages(host), SMALL)["resident_bytes"] == 0
    assert model_of(pages(host), VAE)["resident_bytes"] > 0


def test_a_gguf_model_stays_legacy_beside_elastic_ones(host: HostProcess) -> None:
    prompt = ours()
    prompt["1"] = node("LegacyDiffusionModelLoader", unet_name=f"{SMALL}.safetensors")
    prompt["20"] = node(f"{OURS}RegisterModel", pipeline="wan", model=["1", 0])
    assert run_prompt(host, with_inputs(prompt, "7", model=["20", 0])).status == "success"
    assert {role: c["elastic"] for role, c in components(host).items()} == {
        "generator": False,
        "text_encoder": True,
        "vae": True,
    }
    assert components(host)["generator"]["policy"] == "stays until memory is wanted"


def test_the_headroom_that_is_set_is_the_one_that_is_planned_with(host: HostProcess) -> None:
    check = host.post(STATUS + "/check", official(HIGH)).body
    assert check["verdict"] == "fits_with_offload"
    streamed = [phase["streamed_bytes"] for phase in check["phases"] if phase["kind"] == "sample"]
    assert streamed
    assert streamed[0] > 256 * MIB
