"""Makes the pack importable as `vram_headroom`, and lets tests that need a real ComfyUI run where one is given."""

from pathlib import Path

import pytest
from loadpack import load_pack

load_pack()

REAL = Path(__file__).parent / "real"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("a real ComfyUI beside the project (tests/real)")
    group.addoption("--comfyui", metavar="PATH", help="a ComfyUI checkout; without it tests/real is left out")
    group.addoption("--comfyui-python", metavar="PYTHON", help="the interpreter it runs with")
    group.addoption("--comfyui-models", metavar="DIR", help="a models folder with the tiny files that the prompts name")
    group.addoption("--comfyui-fixtures", metavar="DIR", help="custom nodes to load beside ours (tiny text encoder, fake GPU)")
    group.addoption(
        "--comfyui-card", metavar="HOW", choices=("legacy", "dynamic"), help="real errors of a real card (recovery)"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """These tests can't run without a checkout, so without one they are no tests rather than skipped ones."""
    return True if collection_path == REAL and not config.getoption("--comfyui") else None
