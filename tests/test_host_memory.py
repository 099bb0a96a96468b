"""The stand-in's card is booked with the real sizes, by ComfyUI's rules, and runs out of memory as ComfyUI says it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from host.checkpoints import write_official_models
from host.lab import Prompt, node, run_prompt, text_to_video
from host.process import HostProcess, start_host

GIB = 2**30
MIB = 2**20
FP8 = "wan2.2_t2v_high_noise_14B_fp8_scaled"
SMALL = "wan2.1_t2v_1.3B_fp16"
CLIP = "umt5_xxl_fp8_e4m3fn_scaled"
VAE = "wan_2.1_vae"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_official_models(folder, [FP8, SMALL, CLIP, VAE])
    return folder


def official(unet: str, **sizes: Any) -> Prompt:
    return text_to_video(f"{unet}.safetensors", f"{CLIP}.safetensors", f"{VAE}.safetensors", **sizes)


def booked(host: HostProcess) -> dict[str, int]:
    """Bytes on the card per owner."""
    return {entry["owner"]: entry["bytes"] for entry in host.get("/_host/card").body["bookings"]}


def unload_everything(host: HostProcess) -> None:
    host.post("/free", {"unload_models": True, "free_memory": True})
    assert host.get("/_host/idle").status == 200


@pytest.fixture(scope="module")
def sixteen(models: Path) -> Iterator[HostProcess]:
    with start_host(16, models=models, pack=False) as host:
        yield host


def weights(name: str) -> str:
    kinds = {CLIP: "WanTEModel", VAE: "WanVAE"}
    return f"{kinds.get(name, 'WAN21')} weights ({name}.safetensors)"


def test_a_14b_model_is_offloaded_in_part_on_16_gb_and_leaves_what_sampling_needs(sixteen: HostProcess) -> None:
    sixteen.post("/_host/hold", {"node_id": "8", "step": 1})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_prompt, sixteen, official(FP8, width=640, height=640, length=81))
        sixteen.get("/_host/held")
        held, loaded = booked(sixteen), sixteen.get("/_host/loaded").body
        sixteen.post("/_host/release")
        assert running.result(timeout=60).status == "success"
    # ComfyUI's estimate of one forward, which it leaves free: 21 x 80 x 80 latents, 2 bytes, 0.01 x 5120 / 2222 MiB
    forward = int(21 * 80 * 80 * 2 * 0.01 * 5120 / 2222 * MIB)
    # what the tensors of the real class take, as traced: 21 x 40 x 40 tokens, 11.13 tensors of 5120 in 2 bytes
    assert held["WAN21 activations"] == round(21 * 40 * 40 * 5120 * 2 * 11.13) < forward
    reserve = 400 * MIB
    assert 0 < held[weights(FP8)] <= 16 * GIB - forward - reserve
    assert next(entry for entry in loaded if entry["name"] == "WAN21")["bytes_on_card"] == held[weights(FP8)]


def test_what_is_loaded_weighs_what_the_file_holds(sixteen: HostProcess, models: Path) -> None:
    run_prompt(sixteen, official(SMALL, steps=1))
    sizes = {entry["file"]: entry["bytes"] for entry in sixteen.get("/_host/loaded").body}
    for path in models.rglob(f"{SMALL}.safetensors"):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        assert sizes[path.name] == path.stat().st_size - 8 - header


def test_the_books_return_to_zero_after_everything_is_unloaded(sixteen: HostProcess) -> None:
    run_prompt(sixteen, official(SMALL, steps=2))
    assert sum(booked(sixteen).values()) > 0
    unload_everything(sixteen)
    assert booked(sixteen) == {}
    assert sixteen.get("/_host/card").body["used"] == 0
    assert sixteen.get("/_host/loaded").body == []


def test_activations_are_off_the_card_after_the_run(sixteen: HostProcess) -> None:
    run_prompt(sixteen, official(SMALL, steps=3))
    assert all("weights" in owner for owner in booked(sixteen))


def test_a_models_bytes_leave_the_card_when_nobody_holds_it_any_more(sixteen: HostProcess) -> None:
    run_prompt(sixteen, official(SMALL, steps=2))
    assert weights(SMALL) in booked(sixteen)
    other = {"1": node("EmptyImage", width=8, height=8, batch_size=1, color=0), "2": node("PreviewImage", images=["1", 0])}
    run_prompt(sixteen, other)
    assert sixteen.get("/_host/idle").status == 200
    assert booked(sixteen) == {}


def test_a_forward_that_does_not_fit_is_a_real_out_of_memory_error_and_unloads_everything(models: Path) -> None:
    with start_host(3, models=models, pack=False) as host:
        ran = run_prompt(host, official(FP8, width=640, height=640, length=81))
        (error,) = ran.of("execution_error")
        assert error["node_id"] == "8"
        assert error["exception_type"] == "torch.OutOfMemoryError"
        assert error["exception_message"].startswith("CUDA out of memory. Tried to allocate ")
        assert "This error means you ran out of memory on your GPU." in error["exception_message"]
        assert ran.status == "error"
        assert booked(host) == {}
        assert run_prompt(host, official(SMALL, width=128, height=128, length=5)).status == "success"


def test_a_decode_that_does_not_fit_is_done_in_tiles(models: Path) -> None:
    with start_host(2.5, models=models, pack=False) as host:
        ran = run_prompt(host, official(SMALL, width=832, height=480, length=81, steps=1, cfg=1.0))
        assert ran.status == "success"
        assert "retrying with tiled VAE decoding" in host.log_text()
        assert host.get("/_host/card").body["peak"] <= 2.5 * GIB


def test_other_programs_memory_counts(sixteen: HostProcess) -> None:
    unload_everything(sixteen)
    try:
        assert sixteen.post("/_host/others", {"bytes": 15 * GIB}).body == {"free": GIB}
        assert sixteen.get("/system_stats").body["devices"][0]["vram_free"] == GIB
        ran = run_prompt(sixteen, official(SMALL, width=832, height=480, length=81))
        assert ran.of("execution_error")[0]["exception_type"] == "torch.OutOfMemoryError"
    finally:
        sixteen.post("/_host/others", {"bytes": 0})


def test_without_a_card_everything_runs_on_the_cpu(models: Path) -> None:
    with start_host(0, models=models, pack=False) as host:
        assert run_prompt(host, official(FP8)).status == "success"
        assert host.get("/_host/card").body is None
        (device,) = host.get("/system_stats").body["devices"]
        assert (device["type"], device["index"]) == ("cpu", None)
