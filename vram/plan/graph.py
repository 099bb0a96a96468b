"""API-format prompt and vocabulary -> Chain: who computes, with which models, at which shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from ..estimate.pictures import PICTURE_WORK
from .encodes import encodes, largest
from .ours import POLICY
from .prompt import Graph, is_number, is_wildcard, parse_prompt
from .schedule import sampling_steps
from .shapes import LATENTS, LENGTH_INPUTS, MEASURES, PICTURE_RULES, PICTURES, picture_size, whole, work_size
from .sizes import AtMost, Size, combine, plain
from .sizing import Sizing
from .sources import CARRIERS, MODEL_TYPES, OWN_PLACEMENT, SourceFinder, Sources
from .types import (
    Card,
    Chain,
    HostRules,
    Library,
    Media,
    ModelRef,
    NodeVocabulary,
    Phase,
    PhaseKind,
    PoseCache,
    Tile,
    no_media,
)

CLIP_VISION_SIDE: Final = 224
"""Every picture is scaled to this before it is encoded (CLIP ViT-H: ComfyUI comfy/clip_vision_config_h.json, image_size)."""

PASSES_ON: Final = frozenset({*MODEL_TYPES, *CARRIERS, "SIGMAS", "SAMPLER", "NOISE"})
"""Outputs whose making needs no model on the card: patches, guiders, schedules."""

REFERENCE_INPUTS: Final = {
    "Wan22FunControlToVideo": "ref_image",
    "WanSoundImageToVideo": "ref_image",
    "WanSoundImageToVideoExtend": "ref_image",
    "WanHuMoImageToVideo": "",
    "WanSCAILToVideo": "reference_image",
}
"""Nodes whose conditioning carries the latent of a reference picture, when this input is linked (`""`: always)."""

GOES_ON_INPUTS: Final = {"WanSoundImageToVideo": "ref_motion", "WanSoundImageToVideoExtend": "video_latent"}
"""Nodes whose conditioning carries the end of an earlier clip."""

KIND_TITLES: Final[dict[PhaseKind, str]] = {
    "text_encode": "Text encoding",
    "clip_vision": "CLIP vision encoding",
    "audio_encode": "Audio encoding",
    "vae_encode": "VAE encoding",
    "sample": "Sampling",
    "vae_decode": "VAE decoding",
    "other": "",
}


def build_chain(
    prompt: object,
    vocabulary: NodeVocabulary,
    library: Library,
    rules: HostRules,
    card: Card,
    targets: Iterable[str] | None = None,
    media: Media = no_media,
    sizing: Sizing | None = None,
    cached: frozenset[str] = frozenset(),
) -> Chain:
    """The phases of `prompt` in the order they run. Raises PromptError when it is no prompt or runs in a circle.

    `media` tells the sizes of input files, where they are there; `sizing` remembers what was weighed. `cached`
    nodes have their results already (rerun.py).
    """
    graph = parse_prompt(prompt, vocabulary, targets, MEASURES, media)
    finder = SourceFinder(graph, library, rules, card, sizing or Sizing())
    if not graph.targets:
        finder.unknown.append("no output node of this prompt is known here, so nothing would run")
    phases: list[Phase] = []
    done: set[int] = set()
    missing: list[str] = []
    ruled: list[tuple[tuple[str, str, str], str]] = []
    order = graph.run_order(cached)
    for node_id in order:
        if graph.spec(node_id) is None:
            missing.append(graph.class_of(node_id))
            finder.unknown.append(f"{graph.title(node_id)} is of a class this ComfyUI does not have")
            continue
        signature = graph.signature(node_id)
        if signature in done:
            continue  # ComfyUI gives it what an equal node with equal inputs made
        done.add(signature)
        sources = finder.of_node(node_id) or finder.loaded_by(node_id)
        if graph.class_of(node_id) == POLICY:
            ruled.extend((model.key, node_id) for source in sources.values() for model in source.models)
        if not sources:
            if graph.class_of(node_id) in PICTURE_WORK:
                phases.append(_picture_phase(graph, finder, node_id))
            continue
        kind = classify(graph, node_id, sources)
        if kind is not None:
            phases.append(_phase(graph, finder, node_id, kind, sources))
    assumptions = tuple(dict.fromkeys((*finder.assumptions, *graph.assumed)))
    unknown = tuple(dict.fromkeys(finder.unknown))
    idle = bool(cached) and bool(graph.targets) and not order
    absent = tuple(dict.fromkeys(missing))
    return Chain(tuple(phases), finder.models, assumptions, unknown, absent, idle, tuple(ruled), whole=not cached)


GENERATORS: Final = ("MODEL", "WANVIDEOMODEL")
TEXT_ENCODERS: Final = ("CLIP", "WANTEXTENCODER")
VAES: Final = ("VAE", "WANVAE")
"""Link types by role; the second of each is WanVideoWrapper's."""

CONDITIONINGS: Final = frozenset({"CONDITIONING", "WANVIDEOTEXTEMBEDS"})


def classify(graph: Graph, node_id: str, sources: dict[str, Sources]) -> PhaseKind | None:
    """What a node that models reach computes, by the types of its inputs and outputs; None if it computes nothing."""
    spec = graph.spec(node_id)
    outputs = set(spec.outputs) if spec else set()
    linked = {graph.input_type(node_id, name) for name, _ in graph.links(node_id)}
    if "LATENT" in outputs and linked & LATENTS and any(kind in sources for kind in GENERATORS):
        return "sample"
    if any(kind in sources for kind in TEXT_ENCODERS) and outputs & CONDITIONINGS:
        return "text_encode"
    if "CLIP_VISION" in sources and "CLIP_VISION_OUTPUT" in outputs:
        return "clip_vision"
    if "AUDIO_ENCODER" in sources and "AUDIO_ENCODER_OUTPUT" in outputs:
        return "audio_encode"
    if any(kind in sources for kind in VAES):
        if "IMAGE" in outputs and linked & LATENTS:
            return "vae_decode"
        if outputs & {*LATENTS, "CONDITIONING"}:
            return "vae_encode" if encodes(graph, node_id) else None
    # a switch has a wildcard output and passes on what it is given
    if not outputs or any(is_wildcard(kind) or kind in PASSES_ON for kind in outputs):
        return None
    return "other"


def _phase(graph: Graph, finder: SourceFinder, node_id: str, kind: PhaseKind, sources: dict[str, Sources]) -> Phase:
    wanted = {
        "text_encode": TEXT_ENCODERS,
        "clip_vision": ("CLIP_VISION",),
        "audio_encode": ("AUDIO_ENCODER",),
        "vae_encode": VAES,
        "vae_decode": VAES,
        "sample": GENERATORS,
        "other": tuple(sources),
    }[kind]
    models = tuple(model for name in wanted if name in sources for model in sources[name].models)
    loras = tuple(lora for name in wanted if name in sources for lora in sources[name].loras)
    if loras:
        models = tuple(finder.patched(model, loras) for model in models)
    own = any(name in OWN_PLACEMENT for name in wanted if name in sources)
    title = _title(graph, node_id, kind, models)
    phase = Phase(kind, node_id, graph.class_of(node_id), models, loras, title=title, own_placement=own)
    if kind == "other":
        finder.assumptions.append(f"{graph.title(node_id)} is counted by the models that reach it, not by its work")
        return phase
    if kind == "clip_vision":
        return replace(phase, width=CLIP_VISION_SIDE, height=CLIP_VISION_SIDE, frames=_pictures(graph, node_id))
    if kind in ("text_encode", "audio_encode"):
        if own and graph.value(node_id, "device") == "cpu":
            phase = replace(phase, models=tuple(replace(model, on_card=False) for model in models))
        return phase
    size = _worked_at(graph, node_id, kind)
    for name, value in zip(("width", "height", "frames"), size, strict=False):
        if value is None:
            finder.assumptions.append(f"the {name} that {graph.title(node_id)} works at is not known before it runs")
        elif isinstance(value, AtMost):
            finder.assumptions.append(value.note)
    width, height, frames, batch = (plain(value) for value in _on_the_grid(size, models))
    phase = replace(phase, width=width, height=height, frames=frames, batch=batch)
    if kind in ("vae_decode", "vae_encode"):
        phase = replace(phase, tile=_tile(graph, node_id))
    if kind == "sample":
        through = tuple(other for name in wanted if name in sources for other in sources[name].through)
        phase = replace(
            phase,
            steps=sampling_steps(graph, node_id),
            cfg=guidance(graph, node_id),
            window=_window(graph, through) or _wrapper_window(graph, node_id),
            patches=tuple(graph.class_of(other) for other in through),
            blocks_to_swap=_blocks_to_swap(graph, through) if own else None,
            pose_cache=_pose_cache(graph, through),
            reference_frames=_conditions(graph, node_id, REFERENCE_INPUTS),
            goes_on=_conditions(graph, node_id, GOES_ON_INPUTS) > 0,
        )
        if phase.steps is None:
            finder.assumptions.append(f"how many steps {graph.title(node_id)} runs is not known before it runs")
        if phase.cfg is None:
            finder.assumptions.append(f"the cfg of {graph.title(node_id)} is not known; counted with a negative prompt")
    return phase


def _pictures(graph: Graph, node_id: str) -> int:
    """How many pictures a vision model is shown at once; one that nothing is known of counts as a single one."""
    links = [link for name, link in graph.links(node_id) if graph.input_type(node_id, name) in PICTURES]
    return (plain(picture_size(graph, links[0]).frames) if links else None) or 1


def _picture_phase(graph: Graph, finder: SourceFinder, node_id: str) -> Phase:
    """A node that computes on pictures with the card, without a model."""
    links = [link for name, link in graph.links(node_id) if graph.input_type(node_id, name) in PICTURES]
    size = picture_size(graph, links[0]) if links else Size()
    width, height, frames, _ = (plain(value) for value in size)
    title = graph.class_of(node_id)
    if None in (width, height, frames):
        finder.assumptions.append(
            f"what {graph.title(node_id)} needs on the card depends on its input's size; it is not counted"
        )
    return Phase("other", node_id, title, (), width=width, height=height, frames=frames, batch=1, title=title)


def _on_the_grid(size: Size, models: tuple[ModelRef, ...]) -> Size:
    """Sides in whole latent cells: what is asked for beyond them is cut off (ComfyUI: width // 8, or // 16 for the 2.2 VAE)."""
    stride = next((model.spatial_stride for model in models if model.spatial_stride), 8)
    sides = (combine(lambda side: max(1, side // stride) * stride, side) for side in (size.width, size.height))
    return Size(*sides, frames=size.frames, batch=size.batch)


def _worked_at(graph: Graph, node_id: str, kind: PhaseKind) -> Size:
    """The size of the clip that a node samples, decodes or encodes."""
    if kind == "vae_encode":
        return largest(encodes(graph, node_id))
    size = work_size(graph, node_id)
    # a latent whose length nothing says is a picture's
    return (
        size._replace(frames=1) if size.width is not None and size.frames is None and not _says_length(graph, node_id) else size
    )


def _says_length(graph: Graph, node_id: str) -> bool:
    """Somewhere upstream along latents and pictures a length is asked for, or a file decides it."""
    seen: set[str] = set()
    open_nodes = [node_id]
    while open_nodes:
        here = open_nodes.pop()
        if here in seen or here not in graph.nodes:
            continue
        seen.add(here)
        if graph.class_of(here) in PICTURE_RULES or any(name in graph.inputs(here) for name in LENGTH_INPUTS):
            return True
        open_nodes += [
            link.node_id for name, link in graph.links(here) if graph.input_type(here, name) in {*LATENTS, *PICTURES}
        ]
    return False


def _tile(graph: Graph, node_id: str) -> Tile | None:
    """The tiles that a tiled encode or decode asks for; None for a whole one."""
    spec = graph.spec(node_id)
    if spec is None or "tile_size" not in spec.inputs:
        return _wrapper_tile(graph, node_id) if spec is not None and "enable_vae_tiling" in spec.inputs else None
    size, overlap = whole(graph, node_id, "tile_size"), _whole_or(graph, node_id, "overlap", 64)
    if plain(size) is None:
        return None
    return Tile(
        size=plain(size) or 0,
        overlap=overlap,
        frames=_whole_or(graph, node_id, "temporal_size", 0) or None,
        frames_overlap=_whole_or(graph, node_id, "temporal_overlap", 0),
    )


def _wrapper_tile(graph: Graph, node_id: str) -> Tile | None:
    """WanVideoWrapper's: a switch, the sides in pixels, and how far one tile lies from the next."""
    side = plain(whole(graph, node_id, "tile_x"))
    if graph.value(node_id, "enable_vae_tiling") is not True or side is None:
        return None
    return Tile(size=side, overlap=max(0, side - _whole_or(graph, node_id, "tile_stride_x", side)))


def _whole_or(graph: Graph, node_id: str, name: str, other: int) -> int:
    value = plain(whole(graph, node_id, name))
    return other if value is None else value


def _conditions(graph: Graph, node_id: str, table: Mapping[str, str]) -> int:
    """How many nodes of `table` reach a sampler through its conditioning, each with the input linked that the table names."""
    found: set[str] = set()
    seen: set[str] = set()
    open_nodes = [node_id]
    while open_nodes:
        here = open_nodes.pop()
        if here in seen or here not in graph.nodes:
            continue
        seen.add(here)
        wanted = table.get(graph.class_of(here))
        if wanted is not None and (not wanted or graph.link(here, wanted) is not None):
            found.add(here)
        open_nodes += [
            link.node_id for name, link in graph.links(here) if graph.input_type(here, name) in ("CONDITIONING", "GUIDER")
        ]
    return len(found)


def _blocks_to_swap(graph: Graph, through: Iterable[str]) -> int:
    """Blocks that WanVideoWrapper keeps off the card: what a node of block-swap settings says, linked to the model's way."""
    for node_id in reversed(tuple(through)):
        for name, link in graph.links(node_id):
            if graph.input_type(node_id, name) == "BLOCKSWAPARGS" and link.node_id in graph.nodes:
                value = graph.value(link.node_id, "blocks_to_swap")
                return int(value) if is_number(value) and value > 0 else 0
    return 0


def _window(graph: Graph, through: Iterable[str]) -> int | None:
    """Latent frames that context windows let a forward see at once; None without windows along time."""
    for node_id in through:
        frames = plain(whole(graph, node_id, "context_length"))
        if frames is None:
            continue
        match graph.class_of(node_id):
            case "WanContextWindowsManual":
                return (frames - 1) // 4 + 1  # this one counts the video's frames
            case "ContextWindowsManual" if graph.value(node_id, "dim") == 2:
                return frames
    return None


POSE_CACHE: Final = "WanAnimate2Cache"
POSE_CACHE_BITS: Final = {"int8": 8, "int4": 4}
"""Its dtypes but for the default, which is the model's own (ComfyUI comfy_extras/nodes_wan.py, 0.33)."""


def _pose_cache(graph: Graph, through: Iterable[str]) -> PoseCache | None:
    """The last cache node on the model's way is the one that counts: each puts its own in the place of the one before."""
    found = next((node_id for node_id in reversed(tuple(through)) if graph.class_of(node_id) == POSE_CACHE), None)
    if found is None:
        return None
    return PoseCache(graph.value(found, "device") == "gpu", POSE_CACHE_BITS.get(str(graph.value(found, "dtype")), 0))


def _wrapper_window(graph: Graph, node_id: str) -> int | None:
    """WanVideoWrapper's context options are linked to its sampler, and count the video's frames."""
    for name, link in graph.links(node_id):
        if graph.input_type(node_id, name) == "WANVIDCONTEXT" and link.node_id in graph.nodes:
            frames = plain(whole(graph, link.node_id, "context_frames"))
            return None if frames is None else (frames - 1) // 4 + 1
    return None


def _title(graph: Graph, node_id: str, kind: PhaseKind, models: tuple[ModelRef, ...]) -> str:
    name = KIND_TITLES[kind] or graph.class_of(node_id)
    if kind == "sample":
        files = " ".join(model.file for model in models).lower()
        # a name only: the experts' keys are the same and nothing is decided by this
        noise = next((word for word in ("high", "low") if f"{word}_noise" in files), None)
        if noise:
            return f"{name} ({noise} noise)"
    return name


def guidance(graph: Graph, node_id: str) -> float | None:
    """The cfg a sampler runs with: its own widget or its guider's; a guider without one runs the positive prompt only."""
    owner = _owner(graph, node_id, "cfg", "GUIDER")
    if owner is None:
        guided = any(graph.input_type(node_id, name) == "GUIDER" for name, _ in graph.links(node_id))
        return 1.0 if guided else None
    value = graph.value(owner, "cfg")
    return float(value) if is_number(value) else None


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
