"""Records what loads put on a simulated card of many sizes in a real ComfyUI, under several sets of rules.

    python tests/host/record/record_residency.py --comfyui CHECKOUT --python PYTHON --models FOLDER --packs FOLDER ... \\
        --prompts FOLDER

FOLDER of --models holds the tiny WAN files of the lab, the packs are its tiny text encoder and its simulated GPU, the prompts
are its text-to-video, image-to-video and two-expert graphs; the LoRA and shared-loader graphs are made from those. One process
runs them all. Writes tests/data/residency-VERSION.json: prompts, the models' modules in load order, and for each run what every
model had on the card after each load.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data"
MIB = 1 << 20
GIB = 1 << 30

Prompt = dict[str, dict[str, Any]]

LAB_SIZES = (600, 1220, 1222, 1225, 1230, 1237, 1246, 1260, 1280, 4000)
"""MiB of the lab's card as it comes: it keeps 1219.2 MiB for a forward, weights get the rest."""
SIZES = (9, 16, 24, 32, 44, 60, 80, 110, 150, 400)
"""MiB of a card whose host keeps 10 MiB for a forward, so that the activations of tiny videos count: a decode needs 35 MiB."""
FEW = (24, 60, 150)

NORMAL: Mapping[str, Any] = {
    "vram_state": "NORMAL_VRAM",
    "smart_memory": True,
    "streams": 2,
    "ratio": 0.0,
    "reserve": 8 * MIB,
    "minimum_inference": 10 * MIB,
    "from_list": False,
}

Rules = tuple[Mapping[str, Any], tuple[int, ...]]

RULES: Mapping[str, Rules] = {
    "lab": (
        {
            **NORMAL,
            "streams": 0,
            "ratio": 0.4,
            "reserve": 400 * MIB,
            "minimum_inference": GIB * 0.8 + 400 * MIB,
            "from_list": True,
        },
        LAB_SIZES,
    ),
    "nvidia": (NORMAL, SIZES),
    "others": ({**NORMAL, "streams": 0, "ratio": 0.4}, FEW),
    "low": ({**NORMAL, "vram_state": "LOW_VRAM"}, FEW),
    "none": ({**NORMAL, "vram_state": "NO_VRAM"}, FEW),
    "high": ({**NORMAL, "vram_state": "HIGH_VRAM"}, FEW),
    "not smart": ({**NORMAL, "smart_memory": False}, FEW),
}
"""Rules and sizes. `lab` is the simulated GPU as the lab has it; the others count memory as a driver does."""


# prompts


def make_prompts(folder: Path, text_encoder: str) -> dict[str, Prompt]:
    """The lab's three graphs and the three made from them."""

    def read(name: str) -> Prompt:
        body = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        prompt = {node: {k: v for k, v in data.items() if k != "_meta"} for node, data in body.get("prompt", body).items()}
        for node in prompt.values():
            if node["class_type"] == "CLIPLoader":
                node["inputs"]["clip_name"] = text_encoder
        return prompt

    t2v, experts = read("wan21_t2v_tiny"), read("wan22_two_stage_tiny")
    lora = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": LORA, "strength_model": 0.5}}
    with_lora = copy.deepcopy(t2v)
    with_lora["30"] = lora
    with_lora["7"]["inputs"]["model"] = ["30", 0]
    shared = copy.deepcopy(experts)
    del shared["21"]
    shared["27"]["inputs"] |= {"model": ["1", 0], "shift": 5.0}
    shared_lora = copy.deepcopy(shared)
    shared_lora["30"] = lora
    shared_lora["27"]["inputs"]["model"] = ["30", 0]
    return {
        "t2v": t2v,
        "i2v": read("wan21_i2v_tiny"),
        "two experts": experts,
        "lora": with_lora,
        "shared loader": shared,
        "shared loader, one use with a lora": shared_lora,
    }


LORA = "tiny_lora.safetensors"


def write_lora(folder: Path) -> None:
    """A LoRA of rank 2 on two layers of the tiny diffusion model (dim 128), all zeros."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in ("self_attn.q", "cross_attn.v"):
        shapes[f"diffusion_model.blocks.0.{layer}.lora_A.weight"] = (2, 128)
        shapes[f"diffusion_model.blocks.0.{layer}.lora_B.weight"] = (128, 2)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1] * 2
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LORA).write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def again(prompt: Prompt) -> Prompt:
    """The same graph with another seed: only what depends on it runs."""
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        for name in ("seed", "noise_seed"):
            if name in node["inputs"]:
                node["inputs"][name] += 1
    return changed


def loader_of(prompt: Prompt, node: str) -> str:
    """The loader at the end of a node's model, vae or clip links: what it has first of these it computes with."""
    while "Loader" not in prompt[node]["class_type"] or prompt[node]["class_type"].startswith("Lora"):
        inputs = prompt[node]["inputs"]
        node = str(next(inputs[name] for name in ("model", "vae", "clip") if name in inputs)[0])
    return node


# the host


class Host:
    """A running ComfyUI with the probe."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def run(self, prompt: Prompt, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One prompt under these settings; its loads. Raises RuntimeError where the prompt fails."""
        self.ask("/residency/next", settings)
        prompt_id = self.ask("/prompt", {"prompt": prompt})["prompt_id"]
        while not (history := self.ask(f"/history/{prompt_id}")):
            time.sleep(0.05)
        status = history[prompt_id]["status"]
        if status["status_str"] != "success":
            raise RuntimeError(json.dumps(status)[:2000])
        return self.ask("/residency/seen")["loads"]


@contextlib.contextmanager
def running(checkout: Path, python: str, packs: Sequence[Path], models: Path) -> Iterator[Host]:
    """That checkout on the simulated card, with the probe, in a base folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as base:
        for pack in (HERE / "residency_probe", *packs):
            link = Path(base, "custom_nodes", pack.name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(pack.resolve(), target_is_directory=True)
        for kind in models.resolve().iterdir():
            link = Path(base, "models", kind.name)
            link.parent.mkdir(exist_ok=True)
            if kind.name != "loras":
                link.symlink_to(kind, target_is_directory=True)
        write_lora(Path(base, "models", "loras"))
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        command += ["--base-directory", base, "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        environment = {"FAKE_VRAM_MB": "4000", "PATH": "/usr/bin:/bin", "HOME": base, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output = process.stdout
            assert output is not None
            said: list[str] = []
            for line in output:
                said.append(line)
                if "To see the GUI go to" in line:
                    break
            else:
                raise RuntimeError("ComfyUI did not start:\n" + "".join(said[-40:]))
            threading.Thread(target=lambda: list(output), daemon=True).start()  # an unread pipe would stop it
            yield Host(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait()


# the file


def digest(prompt: Prompt, loads: list[dict[str, Any]], models: dict[str, Any], known: dict[int, str]) -> list[list[Any]]:
    """Loads as [node, loader, patched, required, minimum, full, {loader: loaded}, free]; their models go into `models`.

    `known` maps the probe's numbers to loaders; a second run of the same models goes on with it.
    """
    lines: list[list[Any]] = []
    for load in loads:
        assert len(load["models"]) == 1, "these graphs load one model at a time"
        # a loader that puts its model on the card at once has no links to follow
        loader = loader_of(prompt, load["node"])
        known[load["models"][0]] = loader
        inputs = prompt[loader]["inputs"]
        file = next(value for name, value in inputs.items() if name.endswith("_name"))
        names = load["patched_names"][0]
        patched = bool(names)
        model = models.setdefault(
            file,
            {
                "class": load["class"][0],
                "bytes": load["size"][0],
                "parameters": load["parameters"][0],
                "patched": [],
                "modules": {},
            },
        )
        if patched:
            model["patched"] = names
        assert model["bytes"] == load["size"][0]
        kept = model["modules"].setdefault("patched" if patched else "plain", load["modules"][0])
        assert kept == load["modules"][0], "modules change from load to load"
        loaded = {known[int(number)]: size for number, size in load["loaded"].items()}
        buffers = {known[int(number)]: size for number, size in load["buffer"].items() if size}
        lines.append(
            [load["node"], loader, patched, load["required"], load["minimum"], load["full"], loaded, buffers, load["free"]]
        )
    return lines


def record(host: Host, prompts: Mapping[str, Prompt], rules_by_name: Mapping[str, Rules] = RULES) -> dict[str, Any]:
    """Each prompt on each card, new and then again with another seed."""
    models: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for rules, (settings, sizes) in rules_by_name.items():
        for name, prompt in prompts.items():
            print(rules, name, file=sys.stderr, flush=True)
            for size in sizes:
                known: dict[int, str] = {}
                card = {**settings, "total": size * MIB}
                first = digest(prompt, host.run(prompt, {**card, "fresh": True}), models, known)
                second = digest(prompt, host.run(again(prompt), {**card, "fresh": False}), models, known)
                runs.append({"rules": rules, "prompt": name, "mib": size, "loads": first, "again": second})
    given = {name: settings for name, (settings, _) in rules_by_name.items()}
    version = host.ask("/system_stats")["system"]["comfyui_version"]
    return {"version": version, "rules": given, "prompts": prompts, "models": models, "runs": runs}


def dump(recorded: Mapping[str, Any]) -> str:
    """JSON with one line per run."""

    def lines(values: Iterator[str]) -> str:
        return ",\n  ".join(values)

    def short(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    parts = [f' "version": {short(recorded["version"])}']
    for part in ("rules", "prompts", "models"):
        inner = lines(f"{json.dumps(name)}: {short(value)}" for name, value in recorded[part].items())
        parts.append(f' "{part}": {{\n  {inner}\n }}')
    parts.append(' "runs": [\n  ' + lines(short(run) for run in recorded["runs"]) + "\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--python", default=sys.executable, help="the Python that this ComfyUI runs in")
    parser.add_argument("--models", type=Path, required=True, help="a models folder with the lab's tiny files")
    parser.add_argument("--packs", type=Path, nargs="+", required=True, help="the lab's simulated GPU and tiny text encoder")
    parser.add_argument("--prompts", type=Path, required=True, help="the lab's prompts")
    parser.add_argument("--text-encoder", default="tiny_umt5.safetensors", help="0.8 needs tiny_umt5_anyversion.safetensors")
    options = parser.parse_args()
    prompts = make_prompts(options.prompts, options.text_encoder)
    with running(options.comfyui.resolve(), options.python, options.packs, options.models) as host:
        recorded = record(host, prompts)
    version = ".".join(recorded["version"].split(".")[:2])
    (DATA / f"residency-{version}.json").write_text(dump(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
