"""API-format prompt and vocabulary -> Chain: who computes, with which models, at which shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, NamedTuple, TypeGuard

from .prompt import Graph, is_wildcard, parse_prompt
from .sources import CARRIERS, MODEL_TYPES, SourceFinder, Sources
from .types import Card, Chain, HostRules, Library, ModelRef, NodeVocabulary, Phase, PhaseKind

LENGTH_INPUTS: Final = ("length", "num_frames", "frames", "video_length")
"""Widgets that say how many frames a latent has: types can't tell them from other integers."""

ENCODES_UNASKED: Final = frozenset({"WanVaceToVideo"})
"""Node classes that encode a clip of their own even when no image is linked (ComfyUI comfy_extras/nodes_wan.py)."""

PASSES_ON: Final = frozenset({*MODEL_TYPES, *CARRIERS, "SIGMAS", "SAMPLER", "NOISE"})
"""Outputs whose making needs no model on the card: patches, guiders, schedules."""

KIND_TITLES: Final[dict[PhaseKind, str]] = {
    "text_encode": "Text encoding",
    "clip_vision": "CLIP vision encoding",
    "vae_encode": "VAE encoding",
    "sample": "Sampling",
    "vae_decode": "VAE decoding",
    "other": "",
}


class LatentShape(NamedTuple):
    """A video's size in pixels and frames; None where it is not known before the graph runs."""

    width: int | None
    height: int | None
    frames: int | None
    batch: int | None


def build_chain(
    prompt: object,
    vocabulary: NodeVocabulary,
    library: Library,
    rules: HostRules,
    card: Card,
    targets: Iterable[str] | None = None,
) -> Chain:
    """The phases of `prompt` in the order they run. Raises PromptError when it is no prompt or runs in a circle."""
    graph = parse_prompt(prompt, vocabulary, targets)
    finder = SourceFinder(graph, library, rules, card)
    if not graph.targets:
        finder.unknown.append("no output node of this prompt is known here, so nothing would run")
    phases: list[Phase] = []
    for node_id in graph.run_order():
        if graph.spec(node_id) is None:
            finder.unknown.append(f"{graph.title(node_id)} is of a class this ComfyUI does not have")
            continue
        sources = finder.of_node(node_id)
        if not sources:
            continue
        kind = classify(graph, node_id, sources)
        if kind is not None:
            phases.append(_phase(graph, finder, node_id, kind, sources))
    assumptions = tuple(dict.fromkeys((*finder.assumptions, *graph.assumed)))
    return Chain(tuple(phases), finder.models, assumptions, tuple(dict.fromkeys(finder.unknown)))


def classify(graph: Graph, node_id: str, sources: dict[str, Sources]) -> PhaseKind | None:
    """What a node that models reach computes, by the types of its inputs and outputs; None if it computes nothing."""
    spec = graph.spec(node_id)
    outputs = set(spec.outputs) if spec else set()
    linked = {graph.input_type(node_id, name) for name, _ in graph.links(node_id)}
    if "LATENT" in outputs and "LATENT" in linked and "MODEL" in sources:
        return "sample"
    if "CLIP" in sources and "CONDITIONING" in outputs:
        return "text_encode"
    if "CLIP_VISION" in sources and "CLIP_VISION_OUTPUT" in outputs:
        return "clip_vision"
    if "VAE" in sources:
        if "IMAGE" in outputs and "LATENT" in linked:
            return "vae_decode"
        if outputs & {"LATENT", "CONDITIONING"}:
            encodes = linked & {"IMAGE", "MASK", "VIDEO"} or graph.class_of(node_id) in ENCODES_UNASKED
            return "vae_encode" if encodes else None
    # a switch has a wildcard output and passes on what it is given
    if not outputs or any(is_wildcard(kind) or kind in PASSES_ON for kind in outputs):
        return None
    return "other"


def _phase(graph: Graph, finder: SourceFinder, node_id: str, kind: PhaseKind, sources: dict[str, Sources]) -> Phase:
    wanted = {
        "text_encode": ("CLIP",),
        "clip_vision": ("CLIP_VISION",),
        "vae_encode": ("VAE",),
        "vae_decode": ("VAE",),
        "sample": ("MODEL",),
        "other": tuple(sources),
    }[kind]
    models = tuple(model for name in wanted if name in sources for model in sources[name].models)
    loras = tuple(lora for name in wanted if name in sources for lora in sources[name].loras)
    phase = Phase(kind, node_id, graph.class_of(node_id), models, loras, title=_title(graph, node_id, kind, models))
    if kind == "other":
        finder.assumptions.append(f"{graph.title(node_id)} is counted by the models that reach it, not by its work")
        return phase
    if kind in ("text_encode", "clip_vision"):
        return phase
    shape = latent_shape(graph, node_id)
    for name, value in zip(("width", "height", "frames"), shape, strict=False):
        if value is None:
            finder.assumptions.append(f"the {name} that {graph.title(node_id)} works at is not known before it runs")
    frames = 1 if kind == "vae_encode" and _encodes_one_picture(graph, node_id) else shape.frames
    phase = replace(phase, width=shape.width, height=shape.height, frames=frames, batch=shape.batch)
    if kind == "sample":
        phase = replace(phase, steps=sampling_steps(graph, node_id), cfg=guidance(graph, node_id))
        if phase.steps is None:
            finder.assumptions.append(f"how many steps {graph.title(node_id)} runs is not known before it runs")
        if phase.cfg is None:
            finder.assumptions.append(f"the cfg of {graph.title(node_id)} is not known; counted with a negative prompt")
    return phase


def _encodes_one_picture(graph: Graph, node_id: str) -> bool:
    """Only a reference picture is linked: nodes encode it by itself, not padded to the clip's length."""
    linked = [name for name, _ in graph.links(node_id) if graph.input_type(node_id, name) in ("IMAGE", "MASK", "VIDEO")]
    return bool(linked) and graph.class_of(node_id) not in ENCODES_UNASKED and all(n.startswith("ref") for n in linked)


def _title(graph: Graph, node_id: str, kind: PhaseKind, models: tuple[ModelRef, ...]) -> str:
    name = KIND_TITLES[kind] or graph.class_of(node_id)
    if kind == "sample":
        files = " ".join(model.file for model in models).lower()
        # a name only: the experts' keys are the same and nothing is decided by this
        noise = next((word for word in ("high", "low") if f"{word}_noise" in files), None)
        if noise:
            return f"{name} ({noise} noise)"
    return name


def latent_shape(graph: Graph, node_id: str) -> LatentShape:
    """The size a node works at: from its own widgets, and what those do not say from the node its latent comes from.

    What lies between and may change the size without saying so is named in the graph's assumptions.
    """
    seen: set[str] = set()
    here: str | None = node_id
    known = LatentShape(None, None, None, None)
    scale = 1.0
    while here is not None and here in graph.nodes and here not in seen:
        seen.add(here)
        spec = graph.spec(here)
        inputs = {*graph.inputs(here), *(spec.inputs if spec else ())}
        latents = [link for name, link in graph.links(here) if graph.input_type(here, name) == "LATENT"]
        if {"width", "height"} <= inputs and known.width is None:
            sides = (_positive(graph, here, side) for side in ("width", "height"))
            width, height = (None if side is None else round(side * scale) for side in sides)
            known = known._replace(width=width, height=height)
            if width is None or height is None:
                return known
        length = next((name for name in LENGTH_INPUTS if name in inputs), None)
        if length and known.frames is None:
            known = known._replace(frames=_positive(graph, here, length))
            latents = latents if known.frames else []
        if "batch_size" in inputs and known.batch is None:
            known = known._replace(batch=_positive(graph, here, "batch_size"))
        if not latents or None not in known:
            break
        if here != node_id:
            scale *= _change_of_size(graph, here, len(latents))
        here = latents[0].node_id
    if known.width is None:
        return known
    # a latent without a length is a picture
    return known._replace(frames=known.frames or (None if _says_length(graph, seen) else 1), batch=known.batch or 1)


def _says_length(graph: Graph, node_ids: Iterable[str]) -> bool:
    """A length widget was met whose value is not known."""
    return any(name in graph.inputs(node_id) for node_id in node_ids for name in LENGTH_INPUTS)


def _change_of_size(graph: Graph, node_id: str, latents: int) -> float:
    """How a node between two latents scales their sides; what it may change unseen becomes an assumption."""
    spec = graph.spec(node_id)
    linked = {graph.input_type(node_id, name) for name, _ in graph.links(node_id)}
    if linked & {"MODEL", "GUIDER"} or spec is None:
        return 1.0
    factor = graph.value(node_id, "scale_by") if "scale_by" in spec.inputs else None
    if _is_number(factor) and factor > 0:
        return float(factor)
    if latents > 1:
        graph.assumed[f"{graph.title(node_id)} joins {latents} latents; the first one's size counts"] = None
    elif not {"width", "height"} <= set(spec.inputs) and "LATENT" in spec.outputs:
        graph.assumed[f"{graph.title(node_id)} may change the size of its latent; it counts as unchanged"] = None
    return 1.0


def sampling_steps(graph: Graph, node_id: str) -> int | None:
    """Steps one sampler runs: all of its schedule, or from `start_at_step` to `end_at_step` of it."""
    owner = _owner(graph, node_id, "steps", "SIGMAS")
    if owner is None or _is_split(graph, node_id, owner):
        return None
    steps = _positive(graph, owner, "steps")
    if steps is None:
        return None
    spec = graph.spec(node_id)
    inputs = {*graph.inputs(node_id), *(spec.inputs if spec else ())}
    first = graph.value(node_id, "start_at_step") if "start_at_step" in inputs else 0
    last = graph.value(node_id, "end_at_step") if "end_at_step" in inputs else steps
    if not _is_number(first) or not _is_number(last):
        return None
    return max(0, min(int(last), steps) - int(first))


def _is_split(graph: Graph, node_id: str, owner: str) -> bool:
    """A node between the schedule and the sampler takes a part of it: how many steps that is, is not known."""
    here: str | None = node_id
    while here is not None and here != owner:
        sigmas = [link.node_id for name, link in graph.links(here) if graph.input_type(here, name) == "SIGMAS"]
        here = sigmas[0] if sigmas else None
        if here is not None and here != owner:
            return True
    return False


def guidance(graph: Graph, node_id: str) -> float | None:
    """The cfg a sampler runs with: its own widget or its guider's; a guider without one runs the positive prompt only."""
    owner = _owner(graph, node_id, "cfg", "GUIDER")
    if owner is None:
        guided = any(graph.input_type(node_id, name) == "GUIDER" for name, _ in graph.links(node_id))
        return 1.0 if guided else None
    value = graph.value(owner, "cfg")
    return float(value) if _is_number(value) else None


def _owner(graph: Graph, node_id: str, widget: str, through: str) -> str | None:
    """The node that has `widget`: this one, or the nearest one upstream along links of type `through`."""
    seen: set[str] = set()
    here: str | None = node_id
    while here is not None and here in graph.nodes and here not in seen:
        seen.add(here)
        spec = graph.spec(here)
        if widget in graph.inputs(here) or (spec is not None and widget in spec.inputs):
            return here
        here = next((link.node_id for name, link in graph.links(here) if graph.input_type(here, name) == through), None)
    return None


def _positive(graph: Graph, node_id: str, name: str) -> int | None:
    value = graph.value(node_id, name)
    if not _is_number(value) or not 0 < value < 1 << 24:
        return None
    return int(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    """A number a widget may hold: neither infinite, nor NaN, nor an integer too large for any arithmetic."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18
