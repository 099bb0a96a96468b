"""Writes tests/data/prompts/*.json: official workflows as the real front end turns them into API-format prompts.

usage, in the repository's root: python tests/host/record/record_prompts.py
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import chromium  # noqa: E402 - found through the path above
from host.process import start_host  # noqa: E402
from playwright.sync_api import Browser  # noqa: E402

PROMPTS = ROOT / "tests" / "data" / "prompts"

RECORDED = (
    ("video_wan2_2_14B_t2v", "video_wan2_2_14B_t2v", False),
    ("video_wan2_2_14B_t2v_4steps", "video_wan2_2_14B_t2v", True),
    ("text_to_video_wan", "text_to_video_wan", False),
)
"""File name, template, and whether the template's 4-step switch is on."""

SHOWN = """() => {
    const app = window.comfyAPI?.app?.app;
    return (app?.rootGraph ?? app?.graph)?.nodes.some((node) => node.type === "SaveVideo");
}"""
"""The template is on the canvas: the graph that the front end shows before it saves no video."""

TURN_ON = """() => {
    const app = window.comfyAPI.app.app;
    const node = (app.rootGraph ?? app.graph).nodes.find((node) => node.widgets?.some((w) => w.type === "toggle"));
    const widget = node.widgets.find((w) => w.type === "toggle");
    widget.value = true;
    widget.callback?.(true);
}"""
"""Flips the only toggle of the workflow, as a click does."""


def export(browser: Browser, url: str, turbo: bool = False) -> dict[str, Any]:
    """The prompt that the front end at `url` would queue for the workflow it shows."""
    page = browser.new_page()
    page.goto(url)
    page.wait_for_function(SHOWN)
    if turbo:
        page.evaluate(TURN_ON)
    prompt = page.evaluate("async () => (await window.comfyAPI.app.app.graphToPrompt()).output")
    page.close()
    return {node: {"class_type": entry["class_type"], "inputs": entry["inputs"]} for node, entry in prompt.items()}


def main() -> None:
    PROMPTS.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, template, turbo in RECORDED:
            with start_host(template=template) as host:
                prompt = export(browser, host.url, turbo)
            (PROMPTS / f"{name}.json").write_text(json.dumps(prompt, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            sys.stdout.write(f"{name}: {len(prompt)} nodes\n")


if __name__ == "__main__":
    main()
