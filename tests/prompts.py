"""Official workflows as API-format prompts, recorded from the real front end (tests/host/record/record_prompts.py)."""

import json
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).parent / "data" / "prompts"

OUR_LOADERS = {
    "UNETLoader": "VRAMHeadroomLoadDiffusionModel",
    "CLIPLoader": "VRAMHeadroomLoadTextEncoder",
    "VAELoader": "VRAMHeadroomLoadVAE",
    "CLIPVisionLoader": "VRAMHeadroomLoadCLIPVision",
}


def official(name: str) -> dict[str, Any]:
    """A recorded prompt, fresh each time."""
    return json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))


def with_our_loaders(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt with each stock loader swapped for ours in place: same inputs, another class."""
    return {
        node_id: {**node, "class_type": OUR_LOADERS.get(node["class_type"], node["class_type"])}
        for node_id, node in prompt.items()
    }
