"""Every official WAN workflow, as the real front end turns it into a prompt, against what was read in it by hand.

The expectations (tests/data/templates/expected) were written from the workflows and ComfyUI's node sources, never from a plan.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planlab
import pytest
from vram_headroom.vram.estimate.checkpoint import Checkpoint
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.types import Chain, MissingFileError, NodeSpec, Phase

DATA = Path(__file__).parent / "data" / "templates"
NAMES = sorted(path.stem for path in (DATA / "expected").glob("*.json"))
OTHERS = sorted(path.stem for path in (DATA / "other").glob("*.json") if path.stem != "index")

LIKE = {
    "diffusion_models": "high_noise.safetensors",
    "text_encoders": "umt5.safetensors",
    "vae": "vae.safetensors",
    "clip_vision": "vision.safetensors",
    "loras": "fast.safetensors",
}
"""Which of the tiny test files stands for any file of a folder; of other folders the VAE does."""

LOOPS = {"video_wan_animate2"}
"""Uses node classes that no ComfyUI we know has: what its loop hands on is not known."""


def vocabulary() -> dict[str, NodeSpec]:
    recorded = json.loads((DATA / "vocabulary.json").read_text("utf-8"))
    return {
        name: NodeSpec(
            inputs=spec["inputs"],
            outputs=tuple(spec["outputs"]),
            is_output=spec.get("is_output", False),
            defaults=spec.get("defaults", {}),
            output_names=tuple(spec.get("output_names", ())),
        )
        for name, spec in recorded.items()
    }


VOCABULARY = vocabulary()


def any_file(folder: str, name: str) -> Checkpoint:
    """A folder that has every model file that could be asked for."""
    if not name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".gguf")):
        raise MissingFileError(f"{name} is not in models/{folder}")
    like = planlab.FILES.get((folder, LIKE.get(folder, "")), planlab.FILES[("vae", "vae.safetensors")])
    return Checkpoint(f"/m/{folder}/{name}", like.file_bytes, like.tensors, like.metadata)


def prompt_of(kind: str, name: str) -> dict[str, Any]:
    return json.loads((DATA / kind / f"{name}.json").read_text("utf-8"))["output"]


def chain_of(prompt: dict[str, Any]) -> Chain:
    return build_chain(prompt, VOCABULARY, any_file, planlab.RULES, planlab.card(100_000))


def expected_of(name: str) -> dict[str, Any]:
    return json.loads((DATA / "expected" / f"{name}.json").read_text("utf-8"))


def found_of(phase: Phase, expected: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": phase.kind,
        "models": sorted(model.file for model in phase.models),
        "loras": sorted(lora.file for lora in phase.loras),
        "steps": phase.steps,
        "cfg": phase.cfg,
    }
    # what a model nobody sized works at says nothing about what it needs
    if phase.kind != "other" or not phase.models:
        found |= {"width": phase.width, "height": phase.height, "frames": phase.frames, "batch": phase.batch or 1}
    return found


def wanted_of(entries: list[dict[str, Any]], fields: Iterator[str]) -> list[dict[str, Any]]:
    names = list(fields)
    return [{name: sorted(entry[name]) if name in ("models", "loras") else entry[name] for name in names} for entry in entries]


def test_there_are_32() -> None:
    assert len(NAMES) == 32


@pytest.mark.parametrize("name", NAMES)
def test_the_phases_are_those_read_in_the_workflow(name: str) -> None:
    expected, chain = expected_of(name), chain_of(prompt_of("prompts", name))
    by_node: dict[str, list[dict[str, Any]]] = {}
    for entry in expected["phases"]:
        by_node.setdefault(entry["node_id"], []).append(entry)
    assert {phase.node_id for phase in chain.phases} == set(by_node)
    for phase in chain.phases:
        found = found_of(phase, expected)
        if name in LOOPS and phase.frames is None:
            found.pop("frames", None)
        # of several encodes of one node the plan shows one: the largest
        assert found in wanted_of(by_node[phase.node_id], iter(found)), (phase.node_id, by_node[phase.node_id])


@pytest.mark.parametrize("name", NAMES)
def test_the_models_are_those_read_in_the_workflow(name: str) -> None:
    found = {model.file for model in chain_of(prompt_of("prompts", name)).models}
    assert found == {model["file"] for model in expected_of(name)["models"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_node_runs_after_what_it_needs(name: str) -> None:
    prompt = prompt_of("prompts", name)
    seen: list[str] = []
    for phase in chain_of(prompt).phases:
        for value in prompt[phase.node_id].get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and value[0] in {p.node_id for p in chain_of(prompt).phases}:
                assert value[0] in seen
        seen.append(phase.node_id)


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_with_classes_nobody_has_is_unknown_and_names_them(name: str) -> None:
    prompt, missing = prompt_of("prompts", name), expected_of(name)["missing_nodes"]
    chain = chain_of(prompt)
    plan = make_plan(chain, planlab.card(1_000_000), planlab.RULES)
    assert bool(missing) == any("of a class this ComfyUI does not have" in sentence for sentence in chain.unknown)
    if missing:
        assert plan.verdict == "unknown"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_wan_is_never_given_a_number_it_does_not_have(name: str) -> None:
    chain = chain_of(prompt_of("other", name))
    plan = make_plan(chain, planlab.card(1_000_000), planlab.RULES)
    assert plan.message
    assert all(phase.frames is None or phase.frames >= 1 for phase in chain.phases)


REFERENCES = {
    "video_wan2_2_14B_s2v": {"3": (1, False), "79:77": (1, True), "85:183": (1, True)},
    "video_wan2_2_14B_fun_control": {"96": (1, False), "95": (1, False)},
    "video_wan2_2_14B_t2v": {"128:81": (0, False), "128:78": (0, False)},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_and_earlier_clips_are_found_in_the_conditioning(name: str) -> None:
    found = {
        phase.node_id: (phase.reference_frames, phase.goes_on)
        for phase in chain_of(prompt_of("prompts", name)).phases
        if phase.kind == "sample"
    }
    assert found == REFERENCES[name]
