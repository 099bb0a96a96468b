"""Starts a real ComfyUI checkout on the CPU, beside the project and untouched by it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from loadpack import ROOT

STATUS, CHECK = "/v1/hardware/vram", "/v1/hardware/vram/check"


class RealComfyUI(NamedTuple):
    url: str
    log: Path
    vram_bytes: int
    """Of the simulated card; 0 without one."""

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except HTTPError as error:
            return error.code, json.loads(error.read())


def write_no_wan(path: Path) -> None:
    """A file with a key that only an image model has."""
    key = "double_blocks.0.img_attn.norm.key_norm.scale"
    header = json.dumps({key: {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))


def start(
    config: pytest.Config, folder: Path, with_pack: bool, fake_vram_mb: int = 0, more: Sequence[Path] = ()
) -> Generator[RealComfyUI]:
    """`more`: further custom nodes. In a folder that it was started in before it finds its inputs again."""
    checkout = Path(str(config.getoption("--comfyui"))).resolve()
    nodes = folder / "custom_nodes"
    shutil.rmtree(nodes, ignore_errors=True)
    nodes.mkdir()
    (folder / "input").mkdir(exist_ok=True)
    if with_pack:
        (nodes / "vram-headroom").symlink_to(ROOT, target_is_directory=True)
    fixtures = config.getoption("--comfyui-fixtures")
    for fixture in [*(sorted(Path(str(fixtures)).iterdir()) if fixtures else []), *more]:
        (nodes / fixture.name).symlink_to(fixture.resolve(), target_is_directory=True)
    models = Path(str(config.getoption("--comfyui-models"))).resolve()
    lines = [f"{name}: {models / name}" for name in ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")]
    paths = folder / "paths.yaml"
    own = folder / "own_models"
    write_no_wan(own / "not_wan.safetensors")
    sections = ["\n  ".join(["lab:", *lines, f"custom_nodes: {nodes}"]), f"own:\n  diffusion_models: {own}"]
    paths.write_text("\n".join(sections) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(config.getoption("--comfyui-python") or sys.executable), "main.py", "--cpu", "--port", str(port)]
    command += ["--listen", "127.0.0.1", "--disable-auto-launch", "--extra-model-paths-config", str(paths)]
    for kind in ("output", "temp", "user"):
        command += [f"--{kind}-directory", str(folder)]
    command += ["--input-directory", str(folder / "input")]
    command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    environment = {**os.environ, **({"FAKE_VRAM_MB": str(fake_vram_mb)} if fake_vram_mb else {})}
    log = folder / "log.txt"
    up = threading.Event()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def follow() -> None:
        with log.open("w") as out:
            for line in process.stdout or ():
                out.write(line)
                out.flush()
                if "To see the GUI go to" in line:
                    up.set()
        up.set()

    threading.Thread(target=follow, daemon=True).start()
    up.wait(120)
    try:
        assert process.poll() is None, log.read_text()
        yield RealComfyUI(f"http://127.0.0.1:{port}", log, fake_vram_mb << 20)
    finally:
        process.terminate()
        process.wait(30)
