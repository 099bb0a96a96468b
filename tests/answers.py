"""Answers of the check, made up: for tests of what the browser makes of them, whatever the planner says today."""

from typing import Any

GIB = 1 << 30


def phase(
    title: str, needed: float, available: float, weights: float = 0.0, kind: str = "other", **shape: Any
) -> dict[str, Any]:
    """One phase; sizes in GiB."""
    expected = int(needed * GIB)
    return {
        "title": title,
        "kind": kind,
        "node_ids": [],
        "resident_bytes": int(weights * GIB),
        "other_models_bytes": 0,
        "streamed_bytes": 0,
        "activation_bytes": {"expected": expected, "lower": int(0.95 * expected), "upper": int(1.1 * expected)},
        "available_bytes": int(available * GIB),
        "short_bytes": max(0, int((needed - available) * GIB)),
        **shape,
    }


def fix(title: str, *changes: dict[str, Any], saves: float = 1.0, **rest: Any) -> dict[str, Any]:
    found = {"id": title.split()[0].lower(), "title": title, "changes": list(changes), "saves_bytes": int(saves * GIB)}
    return {**found, "cost": "", "picture": "nothing", "verdict": "fits", "note": "", **rest}


def answer(*fixes: dict[str, Any], verdict: str = "does_not_fit", **rest: Any) -> dict[str, Any]:
    """Four phases of which the decode does not fit, and these fixes for it."""
    size = {"width": 1280, "height": 720, "frames": 81, "batch": 1}
    found = {
        "fits": verdict != "does_not_fit",
        "verdict": verdict,
        "message": "VAE decoding (node 8) needs about 9.4 GB at 1280×720, 81 frames beside its weights; 7.2 GB of this card's "
        "12.0 GB can be free then. Short by 2.2 GB after the sampling is done.",
        "plan_id": "p",
        "card": {"name": "Simulated 12 GB", "total_bytes": 12 * GIB, "free_bytes": 11 * GIB},
        "ram": None,
        "phases": [
            phase("Text encoding", 0.4, 5.4, weights=6.3, kind="text_encode"),
            phase("Sampling (high noise)", 3.4, 4.1, weights=7.6, kind="sample", **size),
            phase("Sampling (low noise)", 3.4, 4.1, weights=7.6, kind="sample", **size),
            phase("VAE decoding", 9.4, 7.2, weights=0.3, kind="vae_decode", **size),
        ],
        "peak_phase": 3,
        "models": [{"node_id": "1", "role": "vae", "file": "wan_2.1_vae.safetensors", "bytes": 254 << 20}],
        "fixes": list(fixes),
        "assumptions": ["Prompt and negative prompt run one after the other."],
    }
    return {**found, **rest}
