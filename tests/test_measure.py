"""The script that measures on a card, on a machine without one: everything but the card, over a ComfyUI of a few lines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "measure.py"

COMFYUI = {
    "comfyui_version.py": '__version__ = "9.9.9"\n',
    "comfy/__init__.py": "",
    "comfy/options.py": "def enable_args_parsing():\n    pass\n",
    "comfy/ops.py": "disable_weight_init = manual_cast = None\n",
    "comfy/ldm/__init__.py": "",
    "comfy/ldm/wan/__init__.py": "",
    "comfy/ldm/wan/model.py": """
import torch

class WanModel(torch.nn.Module):
    def __init__(self, dim, dtype, device, **config):
        super().__init__()
        if dtype.itemsize == 1:
            raise NotImplementedError("no fp8 here")
        self.weight = torch.nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def forward(self, x, step, context, transformer_options):
        return (x * 2).sum(1) * self.weight[0]
""",
}


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    for name, text in COMFYUI.items():
        path = tmp_path / "comfyui" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "comfyui"


def run(comfyui: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--comfyui", str(comfyui), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(out: Path) -> list[dict[str, Any]]:
    stored = json.loads(out.read_text(encoding="utf-8"))
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["rows"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU measures")
def test_without_a_gpu_it_says_so_and_exits_with_2(comfyui: Path, tmp_path: Path) -> None:
    done = run(comfyui, tmp_path / "out.json")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "Nothing was measured: torch finds no GPU on this machine (--dry-run shows what would be run)."
    ]
    assert not (tmp_path / "out.json").exists()


def test_a_dry_run_fills_every_row_and_a_failure_stays_in_its_row(comfyui: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(comfyui, out, "--dry-run", "--only", "dit")
    assert done.returncode == 0, done.stderr
    seen = {(r["variant"], r["weights"], r["batch"], r["frames"], r["height"]): r for r in rows(out)}
    assert len(seen) == 5 * 2 * 2 * 3 * 2
    first = seen["t2v-1.3b", "fp16", 1, 33, 480]
    latent = 9 * 60 * 104
    assert first["latent"] == [1, 9, 60, 104]
    assert first["peak_bytes"] == first["traced_bytes"] == (16 + 1) * latent * 2
    assert first["output_bytes"] == latent * 2
    assert first["weight_bytes"] == 1536 * 2
    assert first["failure"] is None
    assert seen["t2v-1.3b", "fp8", 1, 33, 480]["failure"] == "NotImplementedError: no fp8 here"
    assert seen["vace-14b", "fp16", 1, 33, 480]["failure"].startswith("AttributeError: module 'comfy.ldm.wan.model'")
    assert seen["vace-14b", "fp16", 1, 33, 480]["peak_bytes"] is None
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert (stored["comfyui"], stored["card"], stored["allocator"]) == ("9.9.9", "none (dry run)", "simulated")


def test_a_second_run_measures_what_is_missing_or_failed_only(comfyui: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert (
        "1/120 dit t2v-14b fp16 (1, 33, 480, 832): 2 MiB"
        in run(comfyui, out, "--dry-run", "--only", "dit", "--limit", "13").stdout
    )
    again = run(comfyui, out, "--dry-run", "--only", "dit", "--limit", "13")
    assert again.stdout.splitlines() == ["13/120 dit t2v-14b fp8 (1, 33, 480, 832): failed: NotImplementedError: no fp8 here"]
