"""Records which of the names in surface.txt a real ComfyUI has, and with which signature.

    python tests/host/record/record_surface.py --comfyui CHECKOUT --python PYTHON_WITH_ITS_REQUIREMENTS

Writes ../data/surface.json, one key per ComfyUI version. Run it once per checkout; the other versions in the file stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    from .introspect import ABSENT
except ImportError:  # run by path
    from introspect import ABSENT

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data" / "surface.json"


def inspect_modules(root: Path, python: str, first: Path | None = None) -> dict[str, str]:
    """What the modules under `root` offer of surface.txt, looked up in a process of its own that runs `first` before."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "surface.json"
        command = [python, str(HERE / "introspect.py"), str(root), str(out), *([str(first)] if first else [])]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            raise RuntimeError(f"introspection of {root.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def as_shipped(found: dict[str, str], checkout: Path) -> dict[str, str]:
    """Without comfy-aimdo where this ComfyUI does not ask for it, though the Python it is inspected with may have it."""
    if "comfy-aimdo" in (checkout / "requirements.txt").read_text(encoding="utf-8"):
        return found
    return {name: ABSENT if name.partition(".")[0] == "comfy_aimdo" else entry for name, entry in found.items()}


def version_of(checkout: Path) -> str:
    scope: dict[str, Any] = {}
    exec((checkout / "comfyui_version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def dump(recorded: dict[str, dict[str, str]]) -> str:
    """One line per name, so that a change of one signature is a change of one line."""
    versions = []
    for version, names in sorted(recorded.items(), key=lambda item: [int(x) for x in item[0].split(".")], reverse=True):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in names.items())
        versions.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--python", default=sys.executable, help="the Python that this ComfyUI runs in")
    options = parser.parse_args()
    checkout = options.comfyui.resolve()
    recorded = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    recorded[version_of(checkout)] = as_shipped(inspect_modules(checkout, options.python), checkout)
    DATA.write_text(dump(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
