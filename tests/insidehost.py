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

def answer(value):
    print("ANSWER", json.dumps(value))
"""

SERVED = """
import asyncio, nodes
from server import PromptServer
from standin import worker
server = PromptServer(asyncio.new_event_loop())
nodes.init_builtin_nodes()
worker.hook_progress(server)
"""

PACK = """
from loadpack import load_pack
pack = load_pack()
"""


def ask_inside(script: str, base: Path, served: bool = False, pack: bool = True, seconds: float = 120) -> Any:
    """Run `script`, which knows `base`, has the pack as `vram_headroom` (unless without `pack`) and calls `answer` with
    something that JSON can say.

    `served`: there is a `server` with a queue, which nobody works off, and `nodes` has the stand-in's classes.
    """
    set_up = SET_UP.format(base=str(base), root=str(TESTS.parent), tests=str(TESTS))
    text = set_up + (SERVED if served else "") + (PACK if pack else "") + script
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=TESTS / "host" / "comfyui",
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    said = next((line for line in done.stdout.splitlines() if line.startswith("ANSWER ")), None)
    assert said is not None, done.stderr
    return json.loads(said.removeprefix("ANSWER "))
