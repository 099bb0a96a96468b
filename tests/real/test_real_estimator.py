"""The self-check and the detection of other models, against the classes of a real ComfyUI. Seconds, no server, no card.

pytest tests/real/test_real_estimator.py --comfyui CHECKOUT --comfyui-python PYTHON
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loadpack import ROOT
from vram_headroom.vram.estimate.backend import parse_version

FAMILIES = {
    "Flux": (16, 8, None),
    "SDXL": (4, 8, None),
    "SD15": (4, 8, None),
    "QwenImage": (16, 8, 4),
    "HunyuanVideo": (16, 8, 4),
    "LTXV": (128, 32, 8),
}
"""Latent channels, pixels and frames of a latent cell, as the VAEs of these models have them."""


def ask(config: pytest.Config, out: Path, *options: str) -> dict[str, Any]:
    checkout = Path(str(config.getoption("--comfyui"))).resolve()
    python = str(config.getoption("--comfyui-python") or sys.executable)
    script = ROOT / "tests" / "real" / "inside_comfyui.py"
    command = [python, str(script), str(out), *options]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=300)
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask(request.config, tmp_path_factory.mktemp("real") / "said.json")


@pytest.mark.parametrize("way", [0, 1, 2], ids=["eager", "fused norm", "fused"])
def test_this_comfyui_agrees_with_the_formulas_within_one_percent(said: dict[str, Any], way: int) -> None:
    found = said["checked"][way]
    assert (found["state"], found["message"]) == ("agrees", "")
    assert {name.split()[0] for name in found["ratios"]} == set(found["kinds"])
    assert all(abs(ratio - 1) <= 0.01 for ratio in found["ratios"].values()), found["ratios"]


def test_the_check_takes_seconds(said: dict[str, Any]) -> None:
    assert max(found["seconds"] for found in said["checked"]) < 10


def test_the_first_look_runs_it_and_the_next_start_reads_it(said: dict[str, Any]) -> None:
    assert said["looked"]["states"] == ["waiting", "agrees", "agrees"]
    assert said["looked"]["kept"]
    assert said["looked"]["host"].startswith("ComfyUI 0.")


def test_an_interrupt_meant_for_a_prompt_is_not_swallowed(said: dict[str, Any]) -> None:
    assert said["interrupted"] == {"interrupt is there": True, "state": "waiting"}


def test_the_backend_of_a_machine_without_a_card(said: dict[str, Any]) -> None:
    backend = said["backend"]
    assert parse_version(said["looked"]["host"].removeprefix("ComfyUI ")) == tuple(backend["comfyui"])
    assert (backend["fused_rope"], backend["fused_rms_norm"], backend["attention"]) == (False, False, "split")
    assert (backend["allocator"], backend["element_bytes"], backend["vae_element_bytes"]) == ("unknown", 4, 4)


def test_layers_that_dynamic_vram_leaves_without_weights_are_traced_alike(
    request: pytest.FixtureRequest, said: dict[str, Any], tmp_path: Path
) -> None:
    if tuple(said["backend"]["comfyui"]) < (0, 16, 0):  # releases before it know no DynamicVRAM
        return
    under_aimdo = ask(request.config, tmp_path / "said.json", "aimdo")
    assert [found["ratios"] for found in under_aimdo["checked"]] == [found["ratios"] for found in said["checked"]]


def test_a_vae_as_the_check_prepares_it_needs_what_was_recorded_of_it(said: dict[str, Any]) -> None:
    version = ".".join(str(part) for part in said["backend"]["comfyui"][:2])
    recorded = json.loads((ROOT / "tests" / "data" / f"traces-{version}.json").read_text(encoding="utf-8"))
    rows = [dict(zip(recorded["columns"], row, strict=True)) for row in recorded["rows"]]
    for component, variant, peak in said["vaes"]:
        (found,) = (
            row["peak_bytes"]
            for row in rows
            if (row["component"], row["variant"], row["weights"], row["workspace"]) == (component, variant, "fp16", "none")
            and (row["batch"], row["frames"], row["height"], row["width"]) == (1, 17, 480, 832)
        )
        assert peak == pytest.approx(found, rel=0.001), (component, variant)


def test_a_vae_that_calls_cudnn_itself_is_traced_alike_without_one(said: dict[str, Any]) -> None:
    assert said["around cuDNN"] == said["vaes"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_header_says_what_the_model_that_comfyui_builds_says(said: dict[str, Any], name: str) -> None:
    answer = said["detected"][name]
    found = answer["found"]
    assert (found["latent_channels"], found["spatial_stride"], found["temporal_stride"]) == FAMILIES[name]
    assert (found["name"], answer["built"][1]) == (name, name)
    for ours, theirs in answer["rows"]:
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert answer["seconds"] < 1
