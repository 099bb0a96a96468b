"""The pack's nodes in the stand-in host: what they hand on, what leaves the card, what they say, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host.lab import Prompt, Ran, node, run_prompt, text_to_video, with_inputs, write_tiny_models
from host.process import HostProcess, start_host
from prompts import OUR_LOADERS, official, with_our_loaders

STATUS = "/api/v1/hardware/vram"
GIB = 1 << 30
OURS = "VRAMHeadroom"
HIGH, LOW = "tiny_wan22_t2v_high_noise_fp16.safetensors", "tiny_wan22_t2v_low_noise_fp16.safetensors"
PLAIN = "tiny_wan21_t2v_fp16.safetensors"
CLIP, VAE = "tiny_umt5.safetensors", "tiny_wan_2.1_vae.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    models = write_tiny_models(tmp_path_factory.mktemp("models"))
    bad = models / "diffusion_models" / "torn.safetensors"
    bad.write_bytes(b"not a header at all")
    flux = {"double_blocks.0.img_attn.norm.key_norm.scale": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}
    header = json.dumps(flux).encode()
    (models / "diffusion_models" / "flux.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with start_host(models=models) as running:
        yield running


@pytest.fixture
def host(tiny: HostProcess) -> HostProcess:
    """Nothing on its card, nothing cached."""
    return emptied(tiny)


@pytest.fixture(scope="module")
def sixteen() -> Iterator[HostProcess]:
    """Official sizes on a 16 GB card."""
    with start_host(vram_gb=16) as running:
        yield running


def emptied(host: HostProcess) -> HostProcess:
    host.post("/free", {"unload_models": True, "free_memory": True})
    host.post("/_host/others", {"bytes": 0})
    assert host.get("/_host/idle").status == 200
    return host


def pictures(host: HostProcess, ran: Ran, node_id: str) -> list[str]:
    saved = ran.history["outputs"][node_id]["images"]
    kind = saved[0]["type"]
    return [
        str(host.get(f"/view?type={kind}&subfolder={image.get('subfolder', '')}&filename={image['filename']}").body)
        for image in saved
    ]


def components(host: HostProcess) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for pipeline in host.get(STATUS).body["pipelines"] for c in pipeline["components"]}


def succeeded(ran: Ran) -> Ran:
    assert ran.status == "success", ran.history["status"]["messages"]
    return ran


def text_of(ran: Ran, node_id: str) -> str:
    """What a node has to say."""
    return ran.history["outputs"][node_id]["text"][0]


def error_of(ran: Ran) -> dict[str, Any]:
    (error,) = ran.of("execution_error")
    return error


def pipeline_graph(**inputs: Any) -> Prompt:
    """Two experts from one loader."""
    chosen = {
        "high_noise_model": HIGH,
        "low_noise_model": LOW,
        "weight_dtype": "default",
        "text_encoder": CLIP,
        "vae": VAE,
        "clip_vision": "none",
        "pipeline": "night",
        "text_encoder_device": "default",
    }
    prompt = text_to_video()
    for loader in "123":
        del prompt[loader]
    prompt["20"] = node(f"{OURS}LoadPipeline", **{**chosen, **inputs})
    prompt = with_inputs(with_inputs(prompt, "4", clip=["20", 2]), "5", clip=["20", 2])
    prompt = with_inputs(prompt, "7", model=["20", 0])
    prompt["17"] = node("ModelSamplingSD3", model=["20", 1], shift=8.0)
    prompt["18"] = node("KSampler", **{**prompt["8"]["inputs"], "model": ["17", 0], "latent_image": ["8", 0], "denoise": 0.5})
    return with_inputs(prompt, "9", samples=["18", 0], vae=["20", 3])


def stock_two_experts() -> Prompt:
    prompt = pipeline_graph()
    del prompt["20"]
    prompt["1"] = node("UNETLoader", unet_name=HIGH, weight_dtype="default")
    prompt["11"] = node("UNETLoader", unet_name=LOW, weight_dtype="default")
    prompt["2"] = node("CLIPLoader", clip_name=CLIP, type="wan", device="default")
    prompt["3"] = node("VAELoader", vae_name=VAE)
    for name, link in {"4": {"clip": ["2", 0]}, "5": {"clip": ["2", 0]}, "7": {"model": ["1", 0]}}.items():
        prompt = with_inputs(prompt, name, **link)
    return with_inputs(with_inputs(prompt, "17", model=["11", 0]), "9", vae=["3", 0])


# loaders


def test_a_graph_with_our_loaders_makes_the_same_picture_to_the_last_bit(host: HostProcess) -> None:
    stock = pictures(host, succeeded(run_prompt(host, text_to_video())), "10")
    assert pictures(host, succeeded(run_prompt(host, with_our_loaders(text_to_video()))), "10") == stock


def test_one_loader_for_all_makes_the_same_picture_as_the_single_ones(host: HostProcess) -> None:
    stock = pictures(host, succeeded(run_prompt(host, stock_two_experts())), "10")
    ran = succeeded(run_prompt(host, pipeline_graph()))
    assert pictures(host, ran, "10") == stock
    assert set(components(host)) == {HIGH, LOW, CLIP, VAE}
    assert {pipeline["name"] for pipeline in host.get(STATUS).body["pipelines"]} == {"night"}


def test_changing_one_file_of_the_pipeline_reloads_that_file_only(host: HostProcess) -> None:
    succeeded(run_prompt(host, pipeline_graph()))
    ran = succeeded(run_prompt(host, pipeline_graph(low_noise_model=PLAIN)))
    loaded = [name for name in ran.executed if name.startswith("20.")]
    assert loaded == ["20.0.0.low"]


def test_without_a_second_model_both_outputs_are_the_first(host: HostProcess) -> None:
    succeeded(run_prompt(host, pipeline_graph(low_noise_model="none")))
    assert set(components(host)) == {HIGH, CLIP, VAE}


def test_an_image_encoder_that_was_not_chosen_is_asked_for_in_words(host: HostProcess) -> None:
    prompt = pipeline_graph()
    prompt["30"] = node("LoadImage", image="example.png")
    prompt["31"] = node("CLIPVisionEncode", clip_vision=["20", 4], image=["30", 0], crop="none")
    prompt["32"] = node(f"{OURS}Status", after=["31", 0])
    ran = run_prompt(host, prompt)
    assert "no image encoder chosen under clip_vision" in json.dumps(ran.of("execution_error"))


def test_an_image_model_is_refused_by_name_and_nothing_is_loaded(host: HostProcess) -> None:
    ran = run_prompt(host, with_inputs(with_our_loaders(text_to_video()), "1", unet_name="flux.safetensors"))
    error = error_of(ran)
    assert error["node_id"] == "1"
    assert "flux.safetensors is a FLUX model, and this node loads WAN diffusion models" in error["exception_message"]
    assert [model for model in host.get("/_host/loaded").body if model["name"] == "WAN21"] == []


def test_a_torn_file_is_named_with_what_to_do(host: HostProcess) -> None:
    error = error_of(run_prompt(host, with_inputs(with_our_loaders(text_to_video()), "1", unet_name="torn.safetensors")))
    assert "torn.safetensors" in error["exception_message"]
    assert "Download it again" in error["exception_message"]


def test_every_node_says_what_it_is_and_has_a_page_of_help(host: HostProcess) -> None:
    found = {name: info for name, info in host.get("/object_info").body.items() if name.startswith(OURS)}
    assert len(found) == 11
    for name, info in found.items():
        assert info["description"], name
        assert info["search_aliases"], name
        assert len(info["output_tooltips"]) == len(info["output"]), name
        assert info["category"].startswith("VRAM Headroom"), name
        assert "hidden" not in info["input"], f"{name}: a hidden input would enter ComfyUI's cache key"
        page = Path(__file__).parent.parent / "web" / "docs" / f"{name}.md"
        assert page.read_text("utf-8").startswith("# "), name
        own = {key for group in info["input"].values() for key in group} - _stock_inputs(host, name)
        for group in info["input"].values():
            for key in own & set(group):
                entry = group[key]
                assert name in OUR_LOADERS.values() or "LoadPipeline" in name or entry[1]["tooltip"], f"{name}.{key}"


def _stock_inputs(host: HostProcess, name: str) -> set[str]:
    stock = {ours: theirs for theirs, ours in OUR_LOADERS.items()}.get(name)
    info = host.get(f"/object_info/{stock}").body[stock] if stock else {"input": {}}
    return {key for group in info["input"].values() for key in group}


# register


def test_models_of_stock_loaders_are_registered_by_a_node_and_handed_on(host: HostProcess) -> None:
    plain = pictures(host, succeeded(run_prompt(host, text_to_video())), "10")
    prompt = text_to_video()
    prompt["20"] = node(f"{OURS}RegisterModel", pipeline="mine", model=["1", 0], clip=["2", 0], vae=["3", 0])
    prompt = with_inputs(with_inputs(prompt, "7", model=["20", 0]), "9", vae=["20", 2])
    ran = succeeded(run_prompt(host, with_inputs(prompt, "4", clip=["20", 1])))
    assert pictures(host, ran, "10") == plain
    assert {name: c["role"] for name, c in components(host).items()} == {
        PLAIN: "generator",
        CLIP: "text_encoder",
        VAE: "vae",
    }


def test_a_model_cloned_by_patch_nodes_is_one_component(host: HostProcess) -> None:
    prompt = with_our_loaders(text_to_video())
    prompt["20"] = node(f"{OURS}RegisterModel", pipeline="wan", model=["7", 0])
    succeeded(run_prompt(host, with_inputs(prompt, "8", model=["20", 0])))
    assert [c["name"] for c in components(host).values() if c["role"] == "generator"] == [PLAIN]


def test_models_that_nobody_registered_are_in_the_list_with_role_and_file(host: HostProcess) -> None:
    succeeded(run_prompt(host, text_to_video()))
    listed = {model["file"]: (model["role"], model["registered"]) for model in host.get(STATUS).body["loaded_models"]}
    assert listed == {PLAIN: ("generator", False), CLIP: ("text_encoder", False), VAE: ("vae", False)}


# policies


def with_policy(prompt: Prompt, policy: str, socket: str, link: list[Any], node_id: str = "20") -> Prompt:
    return {**prompt, node_id: node(f"{OURS}ComponentPolicy", policy=policy, priority=1, **{socket: link})}


def test_a_text_encoder_that_leaves_between_uses_is_gone_when_sampling_begins(sixteen: HostProcess) -> None:
    host = emptied(sixteen)
    prompt = with_our_loaders(official("text_to_video_wan"))
    prompt = with_policy(prompt, "leaves between uses", "clip", ["38", 0])
    prompt = with_inputs(with_inputs(prompt, "6", clip=["20", 1]), "7", clip=["20", 1])
    host.post("/_host/hold", {"node_id": "3", "step": 1})
    queued = host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body["prompt_id"]
    assert host.get("/_host/held").status == 200
    during = components(host)
    host.post("/_host/release")
    assert host.get("/_host/idle").status == 200
    assert during["umt5_xxl_fp8_e4m3fn_scaled.safetensors"]["placement"] == "cpu"
    assert during["wan2.1_t2v_1.3B_fp16.safetensors"]["placement"] == "gpu"
    assert host.get(f"/history/{queued}").body[queued]["status"]["status_str"] == "success"


def test_without_a_policy_everything_stays_that_comfyui_leaves_there(sixteen: HostProcess) -> None:
    host = emptied(sixteen)
    succeeded(run_prompt(host, with_our_loaders(official("text_to_video_wan"))))
    assert {c["placement"] for c in components(host).values()} == {"gpu"}


def test_a_model_that_leaves_when_idle_is_gone_once_the_queue_is_empty(host: HostProcess) -> None:
    prompt = with_policy(with_our_loaders(text_to_video()), "leaves when idle", "model", ["1", 0])
    succeeded(run_prompt(host, with_inputs(prompt, "7", model=["20", 0])))
    assert host.get("/_host/idle").status == 200
    placed = {c["role"]: c["placement"] for c in components(host).values()}
    assert placed == {"generator": "cpu", "text_encoder": "gpu", "vae": "gpu"}


def test_a_policy_ends_with_its_node_and_holds_again_when_the_graph_returns(host: HostProcess) -> None:
    plain = with_our_loaders(text_to_video())
    ruled = with_inputs(with_policy(plain, "pinned to the card", "vae", ["3", 0]), "9", vae=["20", 2])
    seen = []
    for prompt in (ruled, plain, ruled):
        succeeded(run_prompt(host, prompt))
        seen.append(components(host)[VAE]["pinned"])
    assert seen == [True, False, True]


def test_a_pinned_vae_never_leaves_the_card(sixteen: HostProcess) -> None:
    """A hungry prompt, and the button that unloads models, leave it where it is."""
    host = emptied(sixteen)
    prompt = with_our_loaders(official("video_wan2_2_14B_t2v"))
    decode = next(key for key, value in prompt.items() if value["class_type"] == "VAEDecode")
    vae = prompt[decode]["inputs"]["vae"]
    prompt = with_inputs(with_policy(prompt, "pinned to the card", "vae", vae), decode, vae=["20", 2])
    succeeded(run_prompt(host, prompt))
    again = with_inputs(prompt, decode, samples=prompt[decode]["inputs"]["samples"])
    sampler = next(key for key, value in again.items() if "Sampler" in value["class_type"] and "noise_seed" in value["inputs"])
    since = host.get("/_host/log").body[-1]["number"]
    succeeded(run_prompt(host, with_inputs(again, sampler, noise_seed=7)))
    host.post("/free", {"unload_models": True})
    assert host.get("/_host/idle").status == 200
    assert [model["file"] for model in host.get("/_host/loaded").body] == ["wan_2.1_vae.safetensors"]
    unloaded = [entry for entry in host.get(f"/_host/log?since={since}").body if entry["what"] == "unload"]
    assert unloaded
    assert "WanVAE" not in {entry["data"]["model"] for entry in unloaded}


# offload, gate, status


def test_offload_now_sends_text_encoders_away_and_hands_its_input_on(host: HostProcess) -> None:
    plain = pictures(host, succeeded(run_prompt(host, text_to_video())), "10")
    emptied(host)
    prompt = with_our_loaders(text_to_video())
    prompt["20"] = node(f"{OURS}OffloadNow", value=["8", 0], what="text encoders")
    ran = succeeded(run_prompt(host, with_inputs(prompt, "9", samples=["20", 0])))
    assert pictures(host, ran, "10") == plain
    assert {c["role"]: c["placement"] for c in components(host).values()} == {
        "generator": "gpu",
        "text_encoder": "cpu",
        "vae": "gpu",
    }
    assert text_of(ran, "20").startswith("freed ")


def test_offload_now_also_finds_models_of_stock_loaders(host: HostProcess) -> None:
    prompt = text_to_video()
    prompt["20"] = node(f"{OURS}OffloadNow", value=["8", 0], what="everything idle")
    succeeded(run_prompt(host, with_inputs(prompt, "9", samples=["20", 0])))
    assert [model["name"] for model in host.get("/_host/loaded").body] == ["WanVAE"]


@pytest.mark.parametrize("class_type", ["OffloadNow", "Gate"])
def test_a_node_on_the_way_never_makes_the_sampler_run_again(host: HostProcess, class_type: str) -> None:
    choice = {"what": "text encoders"} if class_type == "OffloadNow" else {"if_it_does_not_fit": "stop"}
    prompt = with_our_loaders(text_to_video())
    prompt["20"] = node(f"{OURS}{class_type}", value=["4", 0], **choice)
    prompt = with_inputs(prompt, "8", positive=["20", 0])
    assert "8" in succeeded(run_prompt(host, prompt)).executed
    assert succeeded(run_prompt(host, prompt)).executed == []


def gated(choice: str) -> Prompt:
    prompt = with_our_loaders(official("video_wan2_2_14B_t2v"))
    sampler = next(key for key, value in prompt.items() if value["class_type"] == "KSamplerAdvanced")
    positive = prompt[sampler]["inputs"]["positive"]
    prompt["20"] = node(f"{OURS}Gate", value=positive, if_it_does_not_fit=choice)
    return with_inputs(prompt, sampler, positive=["20", 0])


def test_a_gate_stops_a_graph_that_does_not_fit_before_it_samples(sixteen: HostProcess) -> None:
    host = emptied(sixteen)
    host.post("/_host/others", {"bytes": 13 * GIB})
    ran = run_prompt(host, gated("stop"), extra_data={"vram_headroom": {"override": True}})
    error = error_of(ran)
    assert error["node_id"] == "20"
    assert "Short by" in error["exception_message"]
    assert "Set VRAM Gate to warn" in error["exception_message"]
    assert not [name for name in ran.executed if "Sampler" in gated("stop")[name]["class_type"]]


def test_a_gate_lets_a_graph_pass_that_fits_and_says_so(sixteen: HostProcess) -> None:
    host = emptied(sixteen)
    ran = succeeded(run_prompt(host, gated("stop")))
    assert text_of(ran, "20").startswith("Runs on this card.")


def test_the_status_node_tells_cards_and_models_as_text_and_as_json(host: HostProcess) -> None:
    prompt = with_our_loaders(text_to_video())
    prompt["20"] = node(f"{OURS}Status", after=["8", 0])
    ran = succeeded(run_prompt(host, prompt))
    text = text_of(ran, "20")
    assert text.splitlines()[0].startswith("Simulated 16 GB: ")
    assert f"{PLAIN} (generator): " in text
    assert "20" in run_prompt(host, prompt).executed, "it looks anew each time"


# decode


def with_our_decode(prompt: Prompt, decode: str) -> Prompt:
    return {**prompt, decode: {**prompt[decode], "class_type": f"{OURS}VAEDecode"}}


def test_a_decode_that_fits_is_whole_and_the_same_picture(host: HostProcess) -> None:
    plain = pictures(host, succeeded(run_prompt(host, text_to_video())), "10")
    ran = succeeded(run_prompt(host, with_our_decode(text_to_video(), "9")))
    assert pictures(host, ran, "10") == plain
    assert text_of(ran, "9") == "decoded whole"


def test_a_decode_fits_after_everything_else_has_left(sixteen: HostProcess) -> None:
    """The 14B fills the card while it samples; 480p needs about 3 GB for its decode, which ComfyUI makes room for."""
    host = emptied(sixteen)
    prompt = with_our_loaders(official("video_wan2_2_14B_t2v"))
    decode = next(key for key, value in prompt.items() if value["class_type"] == "VAEDecode")
    ran = succeeded(run_prompt(host, with_our_decode(prompt, decode)))
    assert text_of(ran, decode) == "decoded whole"


def test_a_decode_that_can_never_fit_is_done_in_the_largest_tiles_and_says_so(sixteen: HostProcess) -> None:
    host = emptied(sixteen)
    prompt = with_our_loaders(official("text_to_video_wan"))
    prompt = with_our_decode(with_inputs(prompt, "40", width=1280, height=720), "8")
    host.post("/_host/hold", {"node_id": "8"})
    queued = host.post("/prompt", {"prompt": prompt, "client_id": "test"}).body["prompt_id"]
    assert host.get("/_host/held").status == 200
    # another program takes the card while the sampler ran
    host.post("/_host/others", {"bytes": 13 * GIB})
    host.post("/_host/release")
    assert host.get("/_host/idle").status == 200
    entry = host.get(f"/history/{queued}").body[queued]
    assert entry["status"]["status_str"] == "success", entry["status"]
    said = entry["outputs"]["8"]["text"][0]
    assert said.startswith("decoded in tiles of ")
    # 720p, 33 frames: 6.5 GB whole, and 2.7 GB left
    assert 448 <= int(said.split()[4]) <= 832
    assert "whole it needs 6." in said
