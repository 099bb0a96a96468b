"""Fixtures: a real ComfyUI with our pack on a simulated card, and one without it."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loadpack import ROOT
from real_comfyui import STATUS, RealComfyUI, start

FAKE_VRAM_MB = 4000
EVENTS = ROOT / "tests" / "host" / "data" / "events.json"


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
