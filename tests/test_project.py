"""The house itself: who may import whom, what ComfyUI finds in the root, and what an install would pull in."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
from loadpack import ROOT, load_pack

HOST_MODULES = {
    "comfy",
    "comfy_aimdo",
    "comfy_execution",
    "comfy_api",
    "comfyui_version",
    "server",
    "execution",
    "folder_paths",
    "nodes",
}


TEST_ONLY = {"diffusers", "transformers", "accelerate", "pytest", "hypothesis"}


def imports_of(folder: str) -> Iterator[tuple[Path, str]]:
    """Every absolute import below `folder`: the file and the top-level module."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield file, (node.module or "").partition(".")[0]


def climbs_of(folder: str) -> Iterator[tuple[Path, str]]:
    """Every relative import below `folder`, as the path it reaches inside the pack."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        package = file.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                yield file, "/".join((*base, *(node.module or "").split(".")))


def test_the_engine_knows_neither_comfyui_nor_a_web_server() -> None:
    bad = [(str(file), name) for file, name in imports_of("vram") if name in HOST_MODULES | {"aiohttp", *TEST_ONLY}]
    assert bad == []


def test_only_nodes_host_imports_comfyui() -> None:
    outside = [
        (str(file), name)
        for file, name in imports_of("nodes")
        if name in HOST_MODULES and (ROOT / "nodes" / "host") not in file.parents
    ]
    assert outside == []


@pytest.mark.parametrize("room", ["vram/estimate", "vram/plan"])
def test_the_pure_rooms_import_no_torch_no_clock_and_no_psutil(room: str) -> None:
    assert [(str(file), name) for file, name in imports_of(room) if name in {"torch", "time", "psutil", "datetime"}] == []


def test_imports_point_down_only() -> None:
    rank = [
        "vram/units",
        "vram/device",
        "vram/components",
        "vram/recovery",
        "vram/policy",
        "vram/handle",
        "vram/records",
        "vram/estimate",
        "vram/plan",
        "vram/monitor",
        "vram/books",
        "vram/offloader",
        "vram/status",
        "nodes",
    ]

    def level(path: str) -> int | None:
        return next((index for index, prefix in enumerate(rank) if path.startswith(prefix)), None)

    for folder in ("vram", "nodes"):
        for file, target in climbs_of(folder):
            here, there = level(str(file.relative_to(ROOT))), level(target)
            if here is not None and there is not None:
                assert there <= here, f"{file} imports {target}"


def test_the_planner_runs_where_torch_cannot_be_imported() -> None:
    script = """
import sys
sys.modules["torch"] = None
sys.path.insert(0, "tests")
import planlab
"""
    loader = f"""
import importlib.machinery, importlib.util, sys
package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("vram_headroom", None, is_package=True))
package.__path__ = [{str(ROOT)!r}]
sys.modules["vram_headroom"] = package
"""
    plan = """
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
card = planlab.card(5000)
chain = build_chain(planlab.two_experts(), planlab.VOCABULARY, planlab.library, planlab.RULES, card)
sys.stdout.write(make_plan(chain, card, planlab.RULES).verdict)
"""
    done = subprocess.run([sys.executable, "-c", loader + script + plan], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "fits_with_offload"


def test_the_root_survives_pytest_collection_in_a_folder_with_hyphens(tmp_path: Path) -> None:
    folder = tmp_path / "ComfyUI-vram-headroom.1"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "node_modules", "tests", "artifacts"), symlinks=True)
    (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_pack_loads_by_path_under_any_name_and_offers_what_comfyui_asks_for() -> None:
    module = load_pack("some-folder.with_x_a name")
    assert module.NODE_CLASS_MAPPINGS == {}, "there is no ComfyUI here to connect to"
    assert module.WEB_DIRECTORY == "./web"
    del sys.modules["some-folder.with_x_a name"]


def test_an_install_pulls_in_nothing_comfyui_does_not_ship() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[<>=! ]", line)[0] for line in lines if line and not line.startswith("#")]
    assert set(names) <= {"torch", "aiohttp", "safetensors", "psutil", "numpy"}
    assert "torch" in lines, "torch is never pinned"


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    assert project["project"]["name"] == "vram-headroom"
    assert project["tool"]["comfy"]["DisplayName"] == "VRAM Headroom"
    assert f'VERSION = "{version}"' in (ROOT / "nodes" / "pack.py").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_script_under_web_is_meant_to_be_imported_by_the_front_end() -> None:
    scripts = {file.name for file in (ROOT / "web").rglob("*.js")}
    assert "vram_headroom.js" in scripts
    assert not any(name.endswith((".test.js", ".min.js")) for name in scripts)


def test_recorded_lock_file_names_no_registry() -> None:
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))
    assert [name for name, entry in lock["packages"].items() if "resolved" in entry] == []
