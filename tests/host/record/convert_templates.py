"""Writes tests/data/templates/*/*.json: official workflows as the real front end turns them into API-format prompts.

usage, in the repository's root:
python tests/host/record/convert_templates.py [--url http://127.0.0.1:8188] [--templates FOLDER] [--into FOLDER] [NAME ...]

`--url` is any running ComfyUI, started with `--disable-all-custom-nodes` and, for the front end that is wanted,
`--front-end-root FOLDER/comfyui_frontend_package/static`. The recorded files came from core 0.33.0 with front end 1.58.1 and
templates 0.1.123. Without `--url` the stand-in host serves the front end: it knows the recorded node types only, so a widget of
any other type may be missing. A node type that the core does not know stays in the prompt with no class and no title, its
widgets named UNKNOWN. Without names: every WAN template into prompts/, and those of other/index.json into other/.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import chromium  # noqa: E402 - found through the path above
from host.process import start_host  # noqa: E402
from playwright.sync_api import Browser  # noqa: E402

DATA = ROOT / "tests" / "data" / "templates"

READY = """() => {
    const manager = window.comfyAPI?.app?.app?.extensionManager;
    return manager?.workflow?.activeWorkflow && !manager.spinner;
}"""
"""The front end shows the graph that it starts with: a graph loaded before that is replaced half-way."""

CONVERT = """async (workflow) => {
    const app = window.comfyAPI.app.app;
    await app.loadGraphData(workflow);
    return (await app.graphToPrompt()).output;
}"""


def installed_templates() -> Path:
    """The folder of the installed templates package. Raises RuntimeError where it is absent."""
    spec = find_spec("comfyui_workflow_templates_json")
    if spec is None or spec.origin is None:
        raise RuntimeError("comfyui-workflow-templates-json is not installed: name a folder with --templates")
    return Path(spec.origin).parent / "templates"


def wan_templates(folder: Path) -> list[str]:
    """Names of the WAN workflows in the folder that do not call a paid service."""
    return sorted(path.stem for path in folder.glob("*wan*.json") if not path.stem.startswith("api_"))


def convert(browser: Browser, url: str, workflow: dict[str, Any]) -> dict[str, Any]:
    """The prompt that the front end at `url` would queue for this workflow, on a page of its own, without node titles."""
    page = browser.new_page()
    try:
        page.goto(url)
        page.wait_for_function(READY)
        prompt = page.evaluate(CONVERT, workflow)
    finally:
        page.close()
    return {node: {key: value for key, value in entry.items() if key != "_meta"} for node, entry in prompt.items()}


def compact(prompt: dict[str, Any]) -> str:
    """`{"output": prompt}`, one node a line."""
    nodes = (
        f"{json.dumps(node)}:{json.dumps(entry, ensure_ascii=False, separators=(',', ':'))}" for node, entry in prompt.items()
    )
    return '{"output":{\n' + ",\n".join(nodes) + "\n}}\n"


def write(browser: Browser, url: str, templates: Path, names: Iterable[str], into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        workflow = json.loads((templates / f"{name}.json").read_text("utf-8"))
        prompt = convert(browser, url, workflow)
        (into / f"{name}.json").write_text(compact(prompt), encoding="utf-8")
        sys.stdout.write(f"{name}: {len(prompt)} nodes\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running ComfyUI; the stand-in host is started when absent")
    parser.add_argument("--templates", type=Path, help="folder of workflows; the installed package when absent")
    parser.add_argument("--into", type=Path, help="where the prompts of the named templates go")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    templates: Path = given.templates or installed_templates()
    with chromium() as browser, nullcontext() if given.url else start_host(pack=False) as host:
        url = given.url or (host.url if host is not None else "")
        if given.names:
            write(browser, url, templates, given.names, given.into or DATA / "prompts")
            return
        write(browser, url, templates, wan_templates(templates), DATA / "prompts")
        index = DATA / "other" / "index.json"
        if index.is_file():
            write(browser, url, templates, json.loads(index.read_text("utf-8"))["templates"], DATA / "other")


if __name__ == "__main__":
    main()
