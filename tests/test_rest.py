"""The pack in the stand-in host, asked over HTTP as the browser and scripts ask."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from client import history_of
from host.checkpoints import header_of
from host.process import HostProcess, start_host
from prompts import official, with_our_loaders

STATUS = "/api/v1/hardware/vram"
CHECK = "/api/v1/hardware/vram/check"
GIB = 1 << 30

T2V_FILES = {
    "128:75": "wan2.2_t2v_high_noise_14B_fp8_scaled",
    "128:76": "wan2.2_t2v_low_noise_14B_fp8_scaled",
    "128:71": "umt5_xxl_fp8_e4m3fn_scaled",
    "128:73": "wan_2.1_vae",
}


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with start_host(vram_gb=16) as running:
        yield running


@pytest.fixture
def empty_host(host: HostProcess) -> HostProcess:
    """The host with nothing on its card, nothing cached and no other program."""
    host.post("/free", {"unload_models": True, "free_memory": True})
    host.post("/_host/others", {"bytes": 0})
    return host


def finish(host: HostProcess, prompt_id: str) -> dict[str, Any]:
    """The history entry of a prompt, once it has ended."""
    return history_of(host.url, prompt_id)


def tensor_bytes(name: str) -> int:
    header = header_of(name)
    return max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")


def test_the_check_names_both_experts_the_encoder_and_the_vae_with_their_exact_bytes(empty_host: HostProcess) -> None:
    answer = empty_host.post(CHECK, {"prompt": official("video_wan2_2_14B_t2v")}).body
    found = {model["node_id"]: (model["file"], model["bytes"]) for model in answer["models"]}
    assert found == {node: (f"{name}.safetensors", tensor_bytes(name)) for node, name in T2V_FILES.items()}
    roles = [model["role"] for model in answer["models"]]
    assert sorted(roles) == ["generator", "generator", "text_encoder", "vae"]


def test_the_4_step_switch_changes_loras_steps_and_cfg(empty_host: HostProcess) -> None:
    slow = empty_host.post(CHECK, official("video_wan2_2_14B_t2v")).body
    fast = empty_host.post(CHECK, official("video_wan2_2_14B_t2v_4steps")).body

    def sampling(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [
            (phase["steps"], phase["cfg"], phase["loras"], phase["width"], phase["height"], phase["frames"])
            for phase in answer["phases"]
            if phase["kind"] == "sample"
        ]

    assert sampling(slow) == [(10, 3.5, [], 640, 640, 81)] * 2
    lora = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise.safetensors"
    assert sampling(fast) == [
        (2, 1.0, [lora.format("high")], 640, 640, 81),
        (2, 1.0, [lora.format("low")], 640, 640, 81),
    ]
    assert [model["role"] for model in slow["models"]].count("lora") == 0
    assert [model["role"] for model in fast["models"]].count("lora") == 2


@pytest.mark.parametrize("workflow", ["video_wan2_2_14B_t2v", "text_to_video_wan"])
def test_an_official_workflow_leaves_nothing_to_assume_but_the_formulas(empty_host: HostProcess, workflow: str) -> None:
    assumptions = empty_host.post(CHECK, official(workflow)).body["assumptions"]
    about = ("Prompt and negative prompt run", "cuDNN may copy", "scales of inputs are counted")
    assert [sentence for sentence in assumptions if not any(part in sentence for part in about)] == []


def test_16_gb_run_with_offload_and_say_what_streams(empty_host: HostProcess) -> None:
    answer = empty_host.post(CHECK, official("video_wan2_2_14B_t2v")).body
    assert (answer["fits"], answer["verdict"]) == (True, "fits_with_offload")
    assert "streams" in answer["message"]
    assert all(phase["short_bytes"] == 0 for phase in answer["phases"])


def test_other_programs_turn_the_verdict(empty_host: HostProcess) -> None:
    prompt = official("text_to_video_wan")
    assert empty_host.post(CHECK, prompt).body["verdict"] == "fits"
    empty_host.post("/_host/others", {"bytes": 13 * GIB})
    answer = empty_host.post(CHECK, prompt).body
    assert (answer["fits"], answer["verdict"]) == (True, "fits_with_offload")
    assert "VAE decoding does not fit whole and is done in tiles" in answer["message"]
    empty_host.post("/_host/others", {"bytes": 15 * GIB})
    answer = empty_host.post(CHECK, prompt).body
    assert (answer["fits"], answer["verdict"]) == (False, "does_not_fit")
    assert "Short by" in answer["message"]
    fixes = {fix["id"]: fix for fix in answer["fixes"]}
    assert fixes["close_other_programs"]["verdict"] == "fits"
    assert all(fix["saves_bytes"] > 0 for fix in answer["fixes"])


def test_system_memory_is_told_beside_the_card(empty_host: HostProcess) -> None:
    ram = empty_host.post(CHECK, official("video_wan2_2_14B_t2v")).body["ram"]
    assert ram["verdict"] in ("fits", "tight", "does_not_fit")
    assert ram["needed_bytes"] > 2 * tensor_bytes("wan2.2_t2v_high_noise_14B_fp8_scaled") - 16 * GIB
    assert "system memory" in ram["message"] or "container" in ram["message"]


def test_the_status_answers_below_both_prefixes_with_the_promised_fields(empty_host: HostProcess) -> None:
    for path in (STATUS, STATUS.removeprefix("/api")):
        status = empty_host.get(path).body
        told = {"version", "taken_at", "devices", "pipelines", "loaded_models", "running", "waiting", "ram", "host"}
        assert {*told, "seams", "self_check"} == set(status)
    (device,) = status["devices"]
    assert device["total_bytes"] == 16 * GIB
    assert device["used_bytes"] + device["free_bytes"] == device["total_bytes"]
    assert (device["pressure_percent"], device["stale"]) == (0.0, False)
    assert status["running"] is None
    assert {seam["state"] for seam in status["seams"]} == {"live"}


def test_what_our_loaders_load_is_registered_and_idle_models_are_no_pressure(empty_host: HostProcess) -> None:
    prompt = with_our_loaders(official("text_to_video_wan"))
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"})
    assert queued.status == 200, queued.body
    assert finish(empty_host, queued.body["prompt_id"])["status"]["status_str"] == "success"
    status = empty_host.get(STATUS).body
    (pipeline,) = status["pipelines"]
    components = {component["role"]: component for component in pipeline["components"]}
    assert (pipeline["name"], pipeline["state"]) == ("wan", "idle")
    assert {role: component["placement"] for role, component in components.items()} == {
        "generator": "gpu",
        "text_encoder": "gpu",
        "vae": "gpu",
    }
    assert components["vae"]["bytes_on_card"] == tensor_bytes("wan_2.1_vae")
    assert components["generator"]["node_id"] == "37"
    assert all(model["registered"] for model in status["loaded_models"])
    (device,) = status["devices"]
    assert device["used_bytes"] > 8 * GIB
    assert device["pressure_percent"] == 0.0


def test_a_model_in_use_is_pressure_and_its_pipeline_active(empty_host: HostProcess) -> None:
    prompt = with_our_loaders(official("text_to_video_wan"))
    empty_host.post("/_host/hold", {"node_id": "3", "step": 2})
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body
    empty_host.get("/_host/held?timeout=60")
    status = empty_host.get(STATUS).body
    empty_host.post("/_host/release")
    finish(empty_host, queued["prompt_id"])
    assert status["running"] == {"prompt_id": queued["prompt_id"], "node_id": "3"}
    assert [pipeline["state"] for pipeline in status["pipelines"]] == ["active"]
    in_use = {model["name"]: model["in_use"] for model in status["loaded_models"]}
    assert in_use == {"WAN21": True, "WanTEModel": False}
    assert status["devices"][0]["pressure_percent"] > 15.0


def test_the_verdict_travels_with_the_prompt_in_under_a_kilobyte(empty_host: HostProcess) -> None:
    prompt = official("video_wan2_2_14B_t2v")
    plan_id = empty_host.post(CHECK, prompt).body["plan_id"]
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body
    attached = finish(empty_host, queued["prompt_id"])["prompt"][3]["vram_headroom"]
    assert attached == {"plan_id": plan_id, "verdict": "fits_with_offload", "fits": True}
    assert len(json.dumps(attached)) < 1024
    assert "streams" in empty_host.log_text()


def test_queueing_the_same_prompt_twice_executes_no_node_the_second_time(empty_host: HostProcess) -> None:
    prompt = with_our_loaders(official("text_to_video_wan"))
    first = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body
    second = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body
    finish(empty_host, first["prompt_id"])
    entry = finish(empty_host, second["prompt_id"])
    cached = next(message[1] for message in entry["status"]["messages"] if message[0] == "execution_cached")
    assert sorted(cached["nodes"]) == sorted(prompt)


def test_a_prompt_that_does_not_fit_is_queued_all_the_same(empty_host: HostProcess) -> None:
    prompt = official("text_to_video_wan")
    empty_host.post("/_host/others", {"bytes": 15 * GIB})
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"})
    assert queued.status == 200
    entry = finish(empty_host, queued.body["prompt_id"])
    assert entry["prompt"][3]["vram_headroom"]["verdict"] == "does_not_fit"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}},
        {"prompt": {"1": {"class_type": "UNETLoader", "inputs": {}}}},
        {"prompt": {"1": {"inputs": {}}}},
        {"prompt": {}},
        {"no": "prompt"},
    ],
)
def test_a_bad_prompt_gets_comfyuis_own_error(empty_host: HostProcess, body: dict[str, Any]) -> None:
    with start_host(vram_gb=16, pack=False) as without_us:
        expected = without_us.post("/prompt", body)
    answer = empty_host.post("/prompt", body)
    assert (answer.status, answer.body) == (expected.status, expected.body)
    assert answer.status == 400


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"nodes": [], "links": []}, "saved workflow"),
        ({"prompt": 5}, "prompt is a non-empty JSON object"),
        ([], "not a JSON object"),
        ({"1": 5}, "not a JSON object with class_type"),
        ({"prompt": {"1": {"class_type": "X", "inputs": {}}}, "partial_execution_targets": "9"}, "list of node ids"),
    ],
)
def test_a_body_that_is_no_prompt_gets_400_and_a_reason(host: HostProcess, body: Any, word: str) -> None:
    answer = host.post(CHECK, body)
    assert answer.status == 400
    assert word in answer.body["error"]["message"]


def test_a_body_over_8_mib_gets_413(host: HostProcess) -> None:
    answer = host.post(CHECK, {"prompt": {"1": {"class_type": "x" * (8 << 20), "inputs": {}}}})
    assert (answer.status, answer.body["error"]["type"]) == (413, "too_large")


def test_only_the_targets_asked_for_are_checked(empty_host: HostProcess) -> None:
    body = {"prompt": official("video_wan2_2_14B_t2v"), "partial_execution_targets": ["404"]}
    answer = empty_host.post(CHECK, body).body
    assert (answer["verdict"], answer["phases"]) == ("unknown", [])


def test_a_machine_without_a_card_is_said_and_nothing_is_refused() -> None:
    with start_host(vram_gb=0) as host:
        assert host.get(STATUS).body["devices"] == []
        answer = host.post(CHECK, official("video_wan2_2_14B_t2v")).body
        assert (answer["fits"], answer["verdict"]) == (True, "unknown")
        queued = host.post("/prompt", {"prompt": official("text_to_video_wan"), "client_id": "test"})
        assert finish(host, queued.body["prompt_id"])["status"]["status_str"] == "success"


def test_the_pack_loads_without_a_warning() -> None:
    with start_host(vram_gb=16) as host:
        lines = host.log_text().splitlines()
    assert [line for line in lines if line.startswith(("WARNING", "ERROR"))] == []


def test_a_second_prompt_is_not_charged_for_the_activations_of_the_running_one(empty_host: HostProcess) -> None:
    prompt = official("video_wan2_2_14B_t2v")
    before = empty_host.post(CHECK, prompt).body
    empty_host.post("/_host/hold", {"node_id": "128:81", "step": 2})
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body
    empty_host.get("/_host/held?timeout=60")
    card = empty_host.get("/_host/card").body
    during = empty_host.post(CHECK, prompt).body
    empty_host.post("/_host/release")
    finish(empty_host, queued["prompt_id"])
    assert any("activations" in booking["owner"] for booking in card["bookings"]), card["bookings"]
    assert during["verdict"] == before["verdict"] == "fits_with_offload"
    assert all(phase["short_bytes"] == 0 for phase in during["phases"])


def test_what_is_predicted_to_be_resident_is_placed_to_within_a_layer(empty_host: HostProcess) -> None:
    prompt = official("video_wan2_2_14B_t2v")
    predicted = next(phase for phase in empty_host.post(CHECK, prompt).body["phases"] if phase["node_ids"] == ["128:81"])
    empty_host.post("/_host/hold", {"node_id": "128:81", "step": 1})
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body
    empty_host.get("/_host/held?timeout=60")
    placed = next(model for model in empty_host.get(STATUS).body["loaded_models"] if model["in_use"])
    empty_host.post("/_host/release")
    finish(empty_host, queued["prompt_id"])
    # a host places whole layers: it may stop short by the largest one of a block
    largest_layer = 13824 * 5120
    assert abs(predicted["resident_bytes"] - placed["bytes_on_card"]) <= largest_layer


def test_the_image_encoder_of_our_loader_is_registered_and_planned(empty_host: HostProcess) -> None:
    prompt = {
        "1": {"class_type": "VRAMHeadroomLoadCLIPVision", "inputs": {"clip_name": "clip_vision_h.safetensors"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "3": {"class_type": "CLIPVisionEncode", "inputs": {"clip_vision": ["1", 0], "image": ["2", 0], "crop": "center"}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }
    answer = empty_host.post(CHECK, prompt).body
    assert [(model["role"], model["bytes"]) for model in answer["models"]] == [("clip_vision", tensor_bytes("clip_vision_h"))]
    assert [(phase["kind"], phase["node_ids"]) for phase in answer["phases"]] == [("clip_vision", ["3"])]
    queued = empty_host.post("/prompt", {"prompt": prompt, "client_id": "test"})
    assert finish(empty_host, queued.body["prompt_id"])["status"]["status_str"] == "success"
    (pipeline,) = empty_host.get(STATUS).body["pipelines"]
    assert [(part["role"], part["placement"]) for part in pipeline["components"]] == [("clip_vision", "gpu")]
