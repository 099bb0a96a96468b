"""Out-of-memory errors inside a real ComfyUI's forwards, and in whole prompts of its server.

pytest tests/real/test_real_recovery.py --comfyui CHECKOUT --comfyui-python PYTHON --comfyui-models DIR --comfyui-fixtures DIR

With a GPU: --comfyui-card legacy, and again with dynamic, in place of the fixtures. Errors are then the card's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from client import history_of
from loadpack import ROOT
from real_comfyui import STATUS, RealComfyUI, start

FAULTS = ROOT / "tests" / "real" / "packs" / "injected_errors"
PROMPTS = ROOT / "tests" / "real" / "data" / "prompts.json"
STEPS = 4
BLOCKS = 2


def swept(config: pytest.Config, out: Path, *options: str) -> dict[str, dict[str, Any]]:
    given = {name: config.getoption(f"--comfyui{name}") for name in ("", "-models", "-fixtures")}
    card = config.getoption("--comfyui-card")
    if not given["-fixtures"] and not card:
        pytest.skip("needs the lab's simulated GPU, --comfyui-fixtures, or a real one, --comfyui-card")
    options = (*options, "--card", str(card)) if card else options
    checkout, models, fixtures = (Path(str(given[name])).resolve() for name in ("", "-models", "-fixtures"))
    python = str(config.getoption("--comfyui-python") or sys.executable)
    script = ROOT / "tests" / "real" / "recovery_lab.py"
    command = [python, str(script), str(out), str(models), str(fixtures), *options]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return swept(request.config, tmp_path_factory.mktemp("recovery") / "said.json")


def test_an_error_at_any_self_attention_costs_nothing_or_is_refused_or_said(said: dict[str, Any]) -> None:
    for name, found in said.items():
        errors = 2 * found["attentions"]
        assert found["wrong"] == [], name
        assert found["repeated"] == [], name
        if name.startswith("foreign"):
            assert found["refused"] == errors, name
        elif name == "LoRA alone on the card":
            assert found["said"] == errors
            assert found["furthest"] < 1e-2
        else:
            assert found["identical"] == errors, name


def test_every_way_to_sample_of_this_comfyui_was_looked_at(said: dict[str, Any]) -> None:
    assert {"plain", "cond and uncond apart", "ancestral", "EasyCache", "LazyCache", "LoRA", "context windows"} <= set(said)
    assert sum(found["attentions"] for found in said.values()) >= 100


def test_a_naive_retry_fails(request: pytest.FixtureRequest, tmp_path: Path, said: dict[str, Any]) -> None:
    names = [name for name in ("EasyCache", "CausalAR") if name in said]
    options = [option for name in names for option in ("--case", name)]
    found = swept(request.config, tmp_path / "naive.json", *options, "--naive")
    for name in names:
        assert len(found[name]["wrong"]) >= found[name]["attentions"] // 2, name


# whole prompts


class Server:
    """A real ComfyUI on a simulated card, with a node pack that runs out of memory where it is asked to."""

    def __init__(self, comfyui: RealComfyUI) -> None:
        self.comfyui = comfyui
        version = comfyui.ask(STATUS)[1]["host"]["comfyui_version"]
        prompts = json.loads(PROMPTS.read_text("utf-8"))
        self.prompt: dict[str, Any] = prompts["t2v"]
        newer = not version.startswith("0.8")
        self.prompt["2"]["inputs"]["clip_name"] = "tiny_umt5.safetensors" if newer else "tiny_umt5_anyversion.safetensors"
        self.prompt["8"]["inputs"] |= {"steps": STEPS, "sampler_name": "euler"}
        self.prompt["20"] = {"class_type": "SaveLatent", "inputs": {"samples": ["8", 0], "filename_prefix": "latents/it"}}

    def run(self, prompt: dict[str, Any], faults: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        self.comfyui.ask("/injected", {"faults": faults or []})
        code, queued = self.comfyui.ask("/prompt", {"prompt": prompt, "client_id": "test"})
        assert code == 200, queued
        return history_of(self.comfyui.url, queued["prompt_id"])

    def again(self, **faults: Any) -> dict[str, Any]:
        """The whole graph anew."""
        self.comfyui.ask("/injected/forget", {})
        # what the flags say is done before or after this one
        picture = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
        self.run({"1": picture, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
        return self.run(self.prompt, [faults] if faults else [])

    def advanced(self, **inputs: Any) -> dict[str, Any]:
        """The graph with a KSampler (Advanced) in the sampler's place."""
        sampler = dict(self.prompt["8"]["inputs"])
        kept = ("model", "positive", "negative", "cfg", "sampler_name", "scheduler", "steps", "latent_image")
        whole = {"start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
        chosen = {**{key: sampler[key] for key in kept}, "noise_seed": sampler["seed"], **whole, **inputs}
        return {**self.prompt, "8": {"class_type": "KSamplerAdvanced", "inputs": chosen}}

    def counted(self) -> dict[str, int]:
        return self.comfyui.ask("/injected")[1]

    def latent(self, folder: Path) -> Any:
        path = max(folder.rglob("it_*.latent"), key=lambda found: found.stat().st_mtime_ns)
        return floats(path)


def floats(path: Path) -> Any:
    import torch

    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read(header["latent_tensor"]["data_offsets"][1]))
    return torch.frombuffer(data, dtype=torch.float32).reshape(header["latent_tensor"]["shape"]).clone()


def simulated_only(config: pytest.Config) -> None:
    if not config.getoption("--comfyui-fixtures") or config.getoption("--comfyui-card"):
        pytest.skip("needs the lab's simulated GPU: --comfyui-fixtures")


@contextmanager
def served(config: pytest.Config, folder: Path) -> Iterator[Server]:
    running = start(config, folder, with_pack=True, fake_vram_mb=4000, more=(FAULTS,))
    try:
        yield Server(next(running))
    finally:
        running.close()


def message_of(entry: dict[str, Any]) -> str:
    return next(data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error")


def test_a_prompt_survives_keeps_its_latent_and_is_taken_up_again_after_a_restart(request: pytest.FixtureRequest) -> None:
    simulated_only(request.config)
    import torch

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with served(request.config, folder) as server:
            assert server.again()["status"]["status_str"] == "success"
            expected = server.latent(folder)
            assert server.counted()["attention"] == BLOCKS * STEPS
            for fault in (
                {"where": "attention", "number": 5, "times": 1, "after": True},
                {"where": "decode", "number": 0, "times": 1},
            ):
                entry = server.again(**fault)
                assert entry["status"]["status_str"] == "success", (fault, entry["status"])
                assert server.counted()["raised"] == 1, fault
                assert torch.equal(server.latent(folder), expected), fault
            # nothing was unloaded since, so there is something to free
            other = {**server.prompt, "4": {**server.prompt["4"], "inputs": {**server.prompt["4"]["inputs"], "text": "a dog"}}}
            entry = server.run(other, [{"where": "text encoder", "number": 0, "times": 1, "after": True}])
            assert entry["status"]["status_str"] == "success", entry["status"]
            assert server.counted()["raised"] == 1
            entry = server.again(where="decode", number=0, times=99)
            assert entry["status"]["status_str"] == "success", "it is decoded in tiles"
            failed = server.again(where="attention", number=2 * BLOCKS, times=99)
            assert failed["status"]["status_str"] == "error"
            message = message_of(failed)
            assert message.startswith("Memory ran out in step 3 of 4: CUDA out of memory"), message
            found = re.search(r"kept in (\S+\.latent) .*steps (\d+), start_at_step (\d+)", message)
            assert found, message
            loaded = server.comfyui.ask(STATUS)[1]["loaded_models"]
            assert [model["bytes_on_card"] for model in loaded if model["bytes_on_card"]] == []
            lost = server.run(
                server.prompt,
                [{"where": "decode", "number": 0, "times": 999}, {"where": "decode tile", "number": 0, "times": 999}],
            )
            assert lost["status"]["status_str"] == "error"
            undecoded = re.search(r"kept as it was in (\S+\.latent)", message_of(lost))
            assert undecoded, message_of(lost)
            assert torch.equal(floats(folder / "input" / undecoded[1]), expected)
            assert server.again()["status"]["status_str"] == "success"
        with served(request.config, folder) as server:
            name, steps, first = found[1], int(found[2]), int(found[3])
            assert (steps, first) == (STEPS, 2)
            choices = server.comfyui.ask("/object_info/LoadLatent")[1]["LoadLatent"]["input"]["required"]["latent"]
            assert name in json.dumps(choices)
            begun = server.advanced(add_noise="enable", end_at_step=first, return_with_leftover_noise="enable")
            assert server.run(begun)["status"]["status_str"] == "success"
            assert torch.equal(floats(folder / "input" / name), server.latent(folder)), "ComfyUI's own half of the sampling"
            resumed = server.advanced(add_noise="disable", start_at_step=first, latent_image=["30", 0])
            resumed["30"] = {"class_type": "LoadLatent", "inputs": {"latent": name}}
            assert server.run(resumed)["status"]["status_str"] == "success"
            assert server.counted()["attention"] == BLOCKS * (STEPS - first)
            # of numbers up to 5: the latent was divided by 1 - sigma once, and multiplied again
            assert float((server.latent(folder) - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_a_hundred_prompts_on_cards_of_any_size_leave_nothing_behind(request: pytest.FixtureRequest) -> None:
    """Errors at random places; memory is measured from the twentieth prompt on."""
    simulated_only(request.config)
    import random

    chosen = random.Random(9)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with served(request.config, folder) as server:
            seen: list[dict[str, int]] = []
            ended: list[str] = []
            for number in range(100):
                server.comfyui.ask("/fake_gpu", {"total_mb": chosen.choice([1240, 1300, 1500, 2000, 4000])})
                prompt = json.loads(json.dumps(server.prompt))
                prompt["8"]["inputs"]["seed"] = number
                prompt["4"]["inputs"]["text"] = f"prompt {number}"
                where = chosen.choice(["attention", "attention", "decode", "decode tile", "text encoder", ""])
                fault = {"where": where, "number": chosen.randrange(8 if where == "attention" else 1)}
                fault |= {"times": chosen.choice([1, 1, 2, 9]), "after": chosen.random() < 0.5}
                ended.append(server.run(prompt, [fault] if where else [])["status"]["status_str"])
                seen.append(server.comfyui.ask("/injected/process")[1])
            assert set(ended) == {"success", "error"}
            early, late = seen[20], seen[-1]
            assert late["threads"] <= early["threads"]
            assert late["files"] <= early["files"] + 1
            assert late["models"] <= early["models"]
            growth = sorted(one["rss"] for one in seen[90:])[5] - sorted(one["rss"] for one in seen[20:30])[5]
            assert growth < 60 << 20, [one["rss"] >> 20 for one in seen[::10]]
            assert len(list((folder / "input").glob("*.latent"))) <= 8
