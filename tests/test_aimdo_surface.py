"""The Python of comfy-aimdo that ComfyUI, this pack and the simulation use, looked up in the real releases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run
from host.record.introspect import ABSENT, read_table

TESTS = Path(__file__).resolve().parent
RECORD = TESTS / "host" / "record"
STANDIN = TESTS / "host" / "comfyui"
ASKED_FOR, NEWEST = "0.4.13", "0.6.0"

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="comfy-aimdo is made for Linux and Windows")

NAMES = [
    *(name for name, _, _ in read_table((RECORD / "surface.txt").read_text("utf-8")) if name.startswith("comfy_aimdo")),
    "comfy_aimdo.control.deinit",
    "comfy_aimdo.control.init_device",
    "comfy_aimdo.control.analyze",
    "comfy_aimdo.control.detect_vendor",
    *(f"comfy_aimdo.control.set_log_{level}" for level in ("none", "critical", "error", "warning", "info", "debug")),
    "comfy_aimdo.control.set_simple_vram_headroom",
    "comfy_aimdo.control.get_simple_vram_headroom",
]

DIFFERENT = {
    "comfy_aimdo.control.set_simple_vram_headroom": (ABSENT, "function (headroom)"),
    "comfy_aimdo.control.get_simple_vram_headroom": (ABSENT, "function ()"),
    "comfy_aimdo.model_vbar.ModelVBAR": ("class (size, device)", "class (size, device, pageout_callback=None)"),
}
"""All that 0.6.0 has otherwise than 0.4.13, of these names."""

LIBRARY = ("set_simple_vram_headroom", "get_simple_vram_headroom", "get_total_vram_usage", "get_devctx", "set_nvml_pressure")
"""Native functions that are called by name, through control.lib."""

LOOK_UP = f"""
import json, sys
sys.path[:0] = [{str(RECORD)!r}]
import introspect
names, library = json.loads(sys.argv[1])
before = introspect.describe_all(names)
control = sys.modules["comfy_aimdo.control"]
assert control.get_total_vram_usage() == 0
assert control.init("cuda")
print(json.dumps([before, [name for name in library if hasattr(control.lib, name)]]))
"""

SIMULATION = """
import sys
from pathlib import Path
sys.path[:0] = [{standin!r}]
from standin.settings import Settings, configure
configure(Settings(Path({root!r}), Path("."), Path("."), vram_bytes=2**34, dynamic=True, aimdo={release!r}))
"""


def look_up(preparation: str) -> tuple[dict[str, str], list[str]]:
    """What each name is, and which native functions there are, in a process of its own."""
    script = f"{preparation}\n{LOOK_UP}"
    command = [sys.executable, "-c", script, json.dumps([NAMES, LIBRARY])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found, library = json.loads(done.stdout)
    return found, library


def real(release: str) -> tuple[dict[str, str], list[str]]:
    return look_up(f"import sys; sys.path[:0] = [{str(Path(sys.prefix) / f'aimdo-{release}')!r}]")


def simulated(release: str) -> tuple[dict[str, str], list[str]]:
    return look_up(SIMULATION.format(standin=str(STANDIN), root=str(TESTS.parent), release=release))


@pytest.fixture(scope="module")
def asked_for() -> tuple[dict[str, str], list[str]]:
    return real(ASKED_FOR)


def test_the_releases_that_are_loaded_are_those_named_here() -> None:
    assert run.aimdo_releases() == [ASKED_FOR, NEWEST]


def test_the_release_that_comfyui_asks_for_has_every_name_but_the_newer_ones(asked_for: tuple[dict[str, str], Any]) -> None:
    found, library = asked_for
    assert {name for name, kind in found.items() if kind == ABSENT} == {
        name for name, (old, _) in DIFFERENT.items() if old == ABSENT
    }
    assert library == [name for name in LIBRARY if name != "get_simple_vram_headroom"]


def test_the_recorded_surface_of_comfyui_0_33_is_this_release(asked_for: tuple[dict[str, str], Any]) -> None:
    recorded = json.loads((TESTS / "host" / "data" / "surface.json").read_text("utf-8"))["0.33.0"]
    assert {name: kind for name, kind in recorded.items() if name.startswith("comfy_aimdo")} == {
        name: kind for name, kind in asked_for[0].items() if name in recorded
    }


def test_the_newest_release_changes_only_what_is_listed(asked_for: tuple[dict[str, str], Any]) -> None:
    found, library = real(NEWEST)
    different = {name: (asked_for[0][name], kind) for name, kind in found.items() if kind != asked_for[0][name]}
    assert different == DIFFERENT
    assert tuple(library) == LIBRARY


def test_the_simulation_has_the_signatures_of_the_release_that_comfyui_asks_for(asked_for: tuple[dict[str, str], Any]) -> None:
    assert simulated(ASKED_FOR) == asked_for


def test_the_simulation_of_the_newest_has_its_getter_and_setter() -> None:
    found, library = simulated(NEWEST)
    assert {name: found[name] for name in DIFFERENT if name.startswith("comfy_aimdo.control")} == {
        name: new for name, (_, new) in DIFFERENT.items() if name.startswith("comfy_aimdo.control")
    }
    assert tuple(library) == LIBRARY
