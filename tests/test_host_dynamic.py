"""DynamicVRAM on the stand-in: what ComfyUI's dynamic patchers make of comfy-aimdo's pages, in prompts on a 16 GB card."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from host.checkpoints import write_official_models
from host.lab import Prompt, Ran, node, run_prompt, text_to_video, with_inputs
from host.process import HostProcess, start_host

GIB = 2**30
MIB = 2**20
PAGE = 32 * MIB
HIGH = "wan2.2_t2v_high_noise_14B_fp8_scaled"
LOW = "wan2.2_t2v_low_noise_14B_fp8_scaled"
SMALL = "wan2.1_t2v_1.3B_fp16"
CLIP = "umt5_xxl_fp8_e4m3fn_scaled"
VAE = "wan_2.1_vae"
PACK = Path(__file__).resolve().parent / "host" / "packs" / "dynamic_vram_nodes.py"
SIZE = {"width": 640, "height": 640, "length": 81}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_official_models(folder, [HIGH, LOW, SMALL, CLIP, VAE])
    return folder


@pytest.fixture(scope="module")
def running(models: Path) -> Iterator[HostProcess]:
    with start_host(16, models=models, pack=False, dynamic=True, custom_nodes=[PACK]) as host:
        yield host


@pytest.fixture
def sixteen(running: HostProcess) -> HostProcess:
    """With no model in it, and nothing in its journal."""
    running.post("/free", {"unload_models": True, "free_memory": True})
    assert running.get("/_host/idle").status == 200
    assert pages(running)["models"] == []
    running.post("/_host/log/clear")
    return running


def official(unet: str = HIGH, **sizes: Any) -> Prompt:
    return text_to_video(f"{unet}.safetensors", f"{CLIP}.safetensors", f"{VAE}.safetensors", **SIZE | sizes)


def two_experts() -> Prompt:
    """High noise for the first of two steps (8), low noise for the second (18)."""
    prompt = official(steps=2)
    sampler = dict(prompt["8"]["inputs"])
    for name in ("seed", "denoise"):
        del sampler[name]
    advanced = {**sampler, "noise_seed": 1, "start_at_step": 0, "end_at_step": 1}
    prompt["8"] = node("KSamplerAdvanced", **advanced, add_noise="enable", return_with_leftover_noise="enable")
    prompt["11"] = node("UNETLoader", unet_name=f"{LOW}.safetensors", weight_dtype="default")
    prompt["17"] = node("ModelSamplingSD3", model=["11", 0], shift=8.0)
    second = {**advanced, "model": ["17", 0], "latent_image": ["8", 0], "start_at_step": 1, "end_at_step": 10000}
    prompt["18"] = node("KSamplerAdvanced", **second, add_noise="disable", return_with_leftover_noise="disable")
    return with_inputs(prompt, "9", samples=["18", 0])


def pages(host: HostProcess) -> dict[str, Any]:
    return host.get("/_host/pages").body


def model_of(books: dict[str, Any], name: str) -> dict[str, Any]:
    return next(model for model in books["models"] if f"({name}." in model["owner"])


def booked(host: HostProcess) -> dict[str, int]:
    return {entry["owner"]: entry["bytes"] for entry in host.get("/_host/card").body["bookings"]}


def noted(host: HostProcess, what: str) -> list[dict[str, Any]]:
    return [entry["data"] for entry in host.get("/_host/log").body if entry["what"] == what]


class Held:
    """A prompt stopped in a forward, looked at, and ended."""

    def __init__(self, host: HostProcess, prompt: Prompt, node_id: str, step: int) -> None:
        host.post("/_host/hold", {"node_id": node_id, "step": step})
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run_prompt, host, prompt)
            assert host.get("/_host/held").body == {"node_id": node_id, "step": step}
            self.books, self.booked, self.card = pages(host), booked(host), host.get("/_host/card").body
            host.post("/_host/release")
            self.ran: Ran = running.result(timeout=60)


def test_a_load_stages_and_only_a_forward_brings_pages(sixteen: HostProcess) -> None:
    held = Held(sixteen, official(), "8", 0)
    expert = model_of(held.books, HIGH)
    (load,) = [entry for entry in noted(sixteen, "load") if entry["model"] == "WAN21"]
    assert load["bytes_on_card"] == expert["forced_bytes"] == 1_638_400
    assert expert["staged_bytes"] == 14_292_933_632
    assert expert["resident_bytes"] == PAGE * len(expert["resident_pages"]) == held.booked[expert["owner"]]
    assert expert["resident_pages"] == list(range(expert["watermark"]))
    assert expert["nr_pages"] == 512, "ten times the model, but no more than the card"


def test_during_a_forward_pages_fill_what_activations_leave_but_for_the_headroom(sixteen: HostProcess) -> None:
    held = Held(sixteen, official(), "8", 1)
    expert = model_of(held.books, HIGH)
    # 21 x 40 x 40 tokens, 11.13 tensors of 5120 in 2 bytes (traced)
    assert held.booked["WAN21 activations"] == round(21 * 40 * 40 * 5120 * 2 * 11.13)
    # a layer of 68 MiB lies in up to four pages, and wants their room twice
    assert 256 * MIB <= held.card["free"] < 256 * MIB + 5 * PAGE
    assert 0 <= held.books["total_vram_usage"] - held.card["used"] < 8 * MIB, "each tensor is counted in whole 2 MiB"
    # the forward ends with time_projection.1, 5120 x 30720 in fp8, the largest layer
    assert expert["pinned_pages"] == [0, 1, 2, 3, 4]


def test_layers_without_a_page_stream_through_buffers_that_go_with_the_node(sixteen: HostProcess) -> None:
    held = Held(sixteen, official(), "8", 1)
    expert = model_of(held.books, HIGH)
    # the largest layers come first in the pages, so what streams is 5120 x 5120 in fp8: 25 MiB, in two chunks; two streams
    assert held.card["bookings"].count({"owner": "layers that are streamed", "bytes": 32 * MIB}) == 2
    forwards = 4  # two sides in turn, in the second of two steps
    per_forward = expert["staged_bytes"] - expert["watermark"] * PAGE
    assert 0 < expert["streamed"] <= forwards * (per_forward + PAGE)
    assert "layers that are streamed" not in booked(sixteen)
    assert [page for model in pages(sixteen)["models"] for page in model["pinned_pages"]] == []


def test_the_pages_in_use_count_as_free_when_sampling_decides_on_batches(models: Path) -> None:
    """So both sides are computed at once though hardly anything is free; the legacy patcher computes them in turn."""
    batch: dict[bool, int] = {}
    for dynamic in (True, False):
        with start_host(16, models=models, pack=False, dynamic=dynamic) as host:
            held = Held(host, official(width=480, height=480, length=33), "8", 1)
            batch[dynamic] = held.booked["WAN21 activations"]
    assert batch[True] == 2 * batch[False]


def test_a_decode_brings_the_decoder_alone(sixteen: HostProcess) -> None:
    assert run_prompt(sixteen, official(steps=1)).status == "success"
    vae = model_of(pages(sixteen), VAE)
    assert vae["read_from_file"] == vae["ram_bytes"] < 0.6 * vae["staged_bytes"]
    assert len(vae["resident_pages"]) < vae["staged_bytes"] / PAGE


def test_two_experts_on_a_16_gb_card_end_with_the_second_one_resident(sixteen: HostProcess) -> None:
    ran = run_prompt(sixteen, two_experts())
    assert ran.status == "success"
    books, card = pages(sixteen), sixteen.get("/_host/card").body
    assert [model["file"] for model in books["models"]] == [f"{name}.safetensors" for name in (CLIP, HIGH, LOW, VAE)]
    encoder, high, low, vae = books["models"]
    assert (encoder["resident_pages"], high["resident_pages"]) == ([], [])
    assert 10 * GIB < low["resident_bytes"] < low["staged_bytes"]
    assert low["resident_pages"] == list(range(low["watermark"]))
    assert vae["pinned_pages"] == low["pinned_pages"] == []
    assert books["resident_bytes"] == sum(model["resident_bytes"] for model in books["models"])
    assert card["peak"] <= 16 * GIB - 256 * MIB
    assert {entry["name"]: entry["bytes_on_card"] for entry in sixteen.get("/_host/loaded").body}["WanVAE"] == (
        vae["resident_bytes"] + vae["forced_bytes"]
    )


def test_dynamic_models_are_never_unloaded_for_each_other(sixteen: HostProcess) -> None:
    run_prompt(sixteen, two_experts())
    assert noted(sixteen, "unload") == []
    assert sorted(entry["name"] for entry in sixteen.get("/_host/loaded").body) == ["WAN21", "WAN21", "WanTEModel", "WanVAE"]


def test_the_picture_is_that_of_the_legacy_patcher(models: Path) -> None:
    pictures: dict[bool, bytes] = {}
    for dynamic in (True, False):
        with start_host(16, models=models, pack=False, dynamic=dynamic) as host:
            ran = run_prompt(host, official(SMALL, width=64, height=64, length=5))
            image = ran.history["outputs"]["10"]["images"][0]
            query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            pictures[dynamic] = host.get(f"/view?{query}").body
    assert pictures[True] == pictures[False]


def test_pages_that_left_come_back_from_ram_and_not_from_the_file(sixteen: HostProcess) -> None:
    run_prompt(sixteen, official(steps=1))
    before = model_of(pages(sixteen), CLIP)
    assert (before["resident_pages"], before["ram_bytes"]) == ([], before["staged_bytes"])
    assert before["read_from_file"] == before["staged_bytes"]
    run_prompt(sixteen, with_inputs(official(steps=1), "4", text="another cat"))
    after = model_of(pages(sixteen), CLIP)
    assert after["read_from_file"] == before["read_from_file"]
    assert after["copied_from_ram"] - before["copied_from_ram"] >= before["staged_bytes"]


def test_an_entire_unload_drops_the_copies_in_ram_too(sixteen: HostProcess) -> None:
    run_prompt(sixteen, official(steps=1))
    sixteen.post("/free", {"unload_models": True})
    assert sixteen.get("/_host/idle").status == 200
    assert booked(sixteen) == {}
    books = pages(sixteen)
    assert (books["resident_bytes"], books["total_vram_usage"]) == (0, 0)
    run_prompt(sixteen, with_inputs(official(steps=1), "8", seed=2))
    expert = model_of(pages(sixteen), HIGH)
    assert expert["read_from_file"] == 2 * expert["staged_bytes"]


def test_a_watermark_limit_lasts_until_its_node_has_ended(sixteen: HostProcess) -> None:
    prompt = official(steps=1)
    prompt["20"] = node("KeepPages", through=["4", 0], limit_mib=65)
    prompt["21"] = node("LookAtPages", through=["20", 0])
    run_prompt(sixteen, with_inputs(prompt, "8", positive=["21", 0]))
    within, after = noted(sixteen, "pages")
    assert model_of(within, CLIP)["watermark_limit"] == 3
    assert model_of(after, CLIP)["watermark_limit"] == 0


def test_another_lora_has_every_layer_copied_anew_and_no_page_moved(models: Path) -> None:
    (models / "loras").mkdir(exist_ok=True)
    (models / "loras" / "any.safetensors").touch()
    prompt = official(SMALL, steps=1, cfg=1.0, width=64, height=64, length=5)
    with start_host(24, models=models, pack=False, dynamic=True) as host:
        run_prompt(host, prompt)
        before = model_of(pages(host), SMALL)
        prompt["12"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="any.safetensors", strength_model=1.0)
        run_prompt(host, with_inputs(prompt, "7", model=["12", 0]))
        after = model_of(pages(host), SMALL)
    assert after["copied_from_ram"] - before["copied_from_ram"] == before["staged_bytes"]
    assert after["resident_pages"] == before["resident_pages"]
    assert after["watermark"] == after["nr_pages"]


def test_a_legacy_model_beside_dynamic_ones_makes_them_give_pages_and_keeps_its_own(sixteen: HostProcess) -> None:
    prompt = two_experts()
    prompt["11"] = node("LegacyDiffusionModelLoader", unet_name=f"{LOW}.safetensors")
    assert run_prompt(sixteen, prompt).status == "success"
    loaded = {entry["file"]: entry for entry in sixteen.get("/_host/loaded").body}
    legacy = loaded[f"{LOW}.safetensors"]
    assert (legacy["dynamic"], loaded[f"{VAE}.safetensors"]["dynamic"]) == (False, True)
    unloads = noted(sixteen, "unload")
    assert "WAN21" in {entry["model"] for entry in unloads}
    assert sum(entry["freed_bytes"] for entry in unloads if entry["model"] == "WAN21") > 8 * GIB
    assert legacy["bytes_on_card"] == booked(sixteen)[f"WAN21 weights ({LOW}.safetensors)"] > 8 * GIB
    assert LOW not in str([model["owner"] for model in pages(sixteen)["models"]])


def test_activations_that_do_not_fit_an_empty_card_are_an_out_of_memory_error(models: Path) -> None:
    with start_host(3, models=models, pack=False, dynamic=True) as host:
        ran = run_prompt(host, official())
        (error,) = ran.of("execution_error")
        assert (error["node_id"], error["exception_type"]) == ("8", "torch.OutOfMemoryError")
        assert booked(host) == {}
        assert run_prompt(host, official(width=128, height=128, length=5)).status == "success"


def test_only_the_worker_calls_comfy_aimdo(sixteen: HostProcess) -> None:
    run_prompt(sixteen, two_experts())
    for path in ("/system_stats", "/_host/loaded", "/_host/pages"):
        assert sixteen.get(path).status == 200
    assert {entry["thread"] for entry in pages(sixteen)["callers"]} == {"worker"}


def test_without_a_card_patchers_are_legacy_ones(models: Path) -> None:
    with start_host(0, models=models, pack=False, dynamic=True) as host:
        assert run_prompt(host, official(SMALL, steps=1, width=64, height=64, length=5)).status == "success"
        assert {entry["dynamic"] for entry in host.get("/_host/loaded").body} == {False}
        assert pages(host) is None
