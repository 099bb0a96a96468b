"""Asks nodes/host something in a process of its own, where the stand-in's modules are ComfyUI and nothing is served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent

SET_UP = """
import json, sys
from pathlib import Path
from standin.settings import Settings, configure
base = Path({base!r})
configure(Settings(pack_root=Path({root!r}), base=base, models=base / "models", vram_bytes=16 * 2**30))
sys.path.insert(0, {tests!r})
from loadpack import load_pack
load_pack()

def answer(value):
    print("ANSWER", json.dumps(value))
"""


def ask_inside(script: str, base: Path) -> Any:
    """Run `script`, which knows `base`, has the pack as `vram_headroom` and calls `answer` with something that JSON can say."""
    text = SET_UP.format(base=str(base), root=str(TESTS.parent), tests=str(TESTS)) + script
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=TESTS / "host" / "comfyui", capture_output=True, text=True, check=False, timeout=240
    )
    said = next((line for line in done.stdout.splitlines() if line.startswith("ANSWER ")), None)
    assert said is not None, done.stderr
    return json.loads(said.removeprefix("ANSWER "))
