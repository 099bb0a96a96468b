"""What a person could turn in a graph to need less of the card: knobs with their settings, the mildest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from .bench import PICTURES, Bench, Knob, Turn, in_words
from .ours import STANDS_FOR, option_widget
from .patch import Change, ReplaceNode, SetInput, Widget
from .shapes import LATENTS, LENGTH_INPUTS
from .siblings import smaller_siblings
from .tiles import tiled_decode
from .types import ModelRef, ModelRole

LEAST_FRAMES: Final = 5
"""The shortest clip offered: two latent frames; one frame is a picture. Our choice."""

LEAST_SIDE: Final = 256
"""The shorter side of the smallest video offered, in pixels; WAN's smallest official size is 480 wide. Our choice."""

ASPECT_TOLERANCE: Final = 0.02
"""How far a smaller size may be from the aspect ratio: 832x480, which everybody uses for 16:9, is 2.5 % away. Our choice."""

MOST_BLOCKS: Final = 48
"""The most that blocks_to_swap takes (WanVideoWrapper nodes_model_loading.py)."""

BLOCK_SWAP: Final = ("WanVideoBlockSwap", "blocks_to_swap")
"""WanVideoWrapper's node and its widget."""


def knobs(bench: Bench) -> tuple[Knob, ...]:
    """Everything that could be turned, what costs the result least first."""
    found = [
        *block_swap(bench, fewer=False),
        *text_encoder_on_cpu(bench),
        *tiled_decode(bench),
        *smaller_batch(bench),
        *smaller_files(bench, "text_encoder"),
        *smaller_files(bench, "generator"),
        *fp8_weights(bench),
        *shorter_video(bench),
        *smaller_video(bench),
    ]
    return tuple(sorted(found, key=lambda knob: PICTURES.index(knob.picture)))


def shorter_video(bench: Bench) -> list[Knob]:
    """Fewer frames, of the form 4n + 1: what WAN's VAE packs without a rest."""
    now = _latent_widgets(bench, LENGTH_INPUTS, above=LEAST_FRAMES)
    longest = max(now.values(), default=0)
    counts = range((longest - 2) // 4 * 4 + 1, LEAST_FRAMES - 1, -4)
    if not counts or bench.widgets.behind(now) is None:
        return []

    def turn(level: int) -> Turn | None:
        frames = counts[level]
        changes = bench.widgets.settings({widget: frames for widget, value in now.items() if value > frames})
        return None if changes is None else Turn(f"Make the video {frames} frames long instead of {longest}", changes)

    return [Knob("shorter_video", "shorter", len(counts), turn)]


def smaller_video(bench: Bench) -> list[Knob]:
    """Smaller pictures of nearly the same aspect ratio, in the steps that the model's patches allow."""
    sides = ("width", "height")
    now = _latent_widgets(bench, sides, above=0, together=True)
    pressing = [planned.phase for planned in bench.pressing if planned.phase.width and planned.phase.height]
    if not now or not pressing or bench.widgets.behind(now) is None:
        return []
    largest = max(pressing, key=lambda phase: ((phase.width or 0) * (phase.height or 0), phase.node_id))
    width, height = largest.width or 0, largest.height or 0
    strides = [model.spatial_stride or 8 for planned in bench.pressing for model in planned.phase.models]
    grid = 2 * max(strides, default=8)
    old: dict[str, int] = {"width": width, "height": height}
    sizes = smaller_sizes(width, height, grid)
    if not sizes:
        return []

    def turn(level: int) -> Turn | None:
        new: dict[str, int] = dict(zip(sides, sizes[level], strict=True))
        changes = bench.widgets.settings(
            {
                # other latents of the graph, such as one that is upscaled later, shrink with the largest
                widget: max(grid, round(value * new[widget.input] / old[widget.input] / grid) * grid)
                for widget, value in now.items()
            }
        )
        return (
            None
            if changes is None
            else Turn(f"Make the video {new['width']}×{new['height']} instead of {width}×{height}", changes)
        )

    return [Knob("smaller_video", "smaller", len(sizes), turn)]


def smaller_sizes(width: int, height: int, grid: int) -> list[tuple[int, int]]:
    """Sizes below `width` x `height` on a grid of `grid` pixels, near the same aspect ratio, the largest first."""
    long, short = max(width, height), min(width, height)
    found: list[tuple[int, int]] = []
    for side in range((short - 1) // grid * grid, LEAST_SIDE - 1, -grid):
        other = round(long * side / short / grid) * grid
        if abs(other * short / (side * long) - 1) <= ASPECT_TOLERANCE:
            found.append((other, side) if width >= height else (side, other))
    return found


def smaller_batch(bench: Bench) -> list[Knob]:
    """Fewer videos at once."""
    now = _latent_widgets(bench, ("batch_size",), above=1)
    most = max(now.values(), default=1)
    if most < 2 or bench.widgets.behind(now) is None:
        return []

    def turn(level: int) -> Turn | None:
        batch = most - 1 - level
        changes = bench.widgets.settings({widget: batch for widget, value in now.items() if value > batch})
        return None if changes is None else Turn(f"Make {batch} video{'s' * (batch > 1)} at a time instead of {most}", changes)

    return [Knob("smaller_batch", "fewer", most - 1, turn)]


def text_encoder_on_cpu(bench: Bench) -> list[Knob]:
    """The `device` widget of text encoder loaders (ComfyUI nodes.py CLIPLoader and its siblings)."""
    wanted = {
        device: "cpu"
        for model in bench.plan.models
        if model.role == "text_encoder" and model.on_card
        for widget in bench.loaders(model)
        if bench.has(*(device := _option(bench, widget, "device"))) and bench.graph.value(*device) != "cpu"
    }
    changes = bench.widgets.settings(wanted) if wanted else None
    if not changes:
        return []
    found = Turn("Run the text encoder on the CPU", changes, "the prompt is encoded on the CPU, which takes longer")
    return [Knob("text_encoder_on_cpu", "slower", 1, lambda level: found)]


def fp8_weights(bench: Bench) -> list[Knob]:
    """UNETLoader's weight_dtype (ComfyUI nodes.py): 16-bit weights are cast to fp8 as they are loaded."""
    wanted = {
        dtype: "fp8_e4m3fn"
        for model in bench.plan.models
        if model.role == "generator"
        for widget in bench.loaders(model)
        if bench.has(*(dtype := _option(bench, widget, "weight_dtype"))) and bench.graph.value(*dtype) == "default"
    }
    changes = bench.widgets.settings(wanted) if wanted else None
    if not changes:
        return []
    found = Turn("Load the diffusion model's weights as fp8 (weight_dtype fp8_e4m3fn)", changes)
    return [Knob("fp8_weights", "lower_precision", 1, lambda level: found)]


def smaller_files(bench: Bench, role: ModelRole) -> list[Knob]:
    """The same models in smaller files that are there, the largest of them first."""
    if bench.library is None or bench.files is None:
        return []
    choices: list[tuple[ModelRef, list[tuple[str, tuple[Change, ...]]]]] = []
    for model in bench.plan.models:
        if model.role != role:
            continue
        found = [
            (file, changes)
            for file in smaller_siblings(model, bench.library, bench.files)
            if (changes := _load_instead(bench, model, file))
        ]
        if found:
            choices.append((model, found))

    def turn(level: int) -> Turn | None:
        picked = [(model.file, *found[min(level, len(found) - 1)]) for model, found in choices]
        names = [_base(file) for _, file, _ in picked]
        title = (
            f"Use {names[0]} instead of {_base(picked[0][0])}"
            if len(picked) == 1
            else f"Use the smaller files {in_words(names)}"
        )
        return Turn(title, tuple(change for _, _, changes in picked for change in changes))

    levels = max((len(found) for _, found in choices), default=0)
    which = "smaller_file" if role == "generator" else "smaller_text_encoder"
    return [Knob(which, "lower_precision", levels, turn)] if levels else []


GGUF_LOADERS: Final[Mapping[str, str]] = {"UNETLoader": "UnetLoaderGGUF", "CLIPLoader": "CLIPLoaderGGUF"}
"""Stock loader -> the one of ComfyUI-GGUF with the same name for its file widget and the same output (its nodes.py)."""

TO_GGUF: Final[Mapping[str, str]] = {**GGUF_LOADERS, **{ours: GGUF_LOADERS[stock] for ours, stock in STANDS_FOR.items()}}
"""Loader -> the one of ComfyUI-GGUF that can take its place."""


def _load_instead(bench: Bench, model: ModelRef, file: str) -> tuple[Change, ...]:
    """Changes that make every loader of `model` read `file`; empty if one can't."""
    changes: list[Change] = []
    is_gguf = file.lower().endswith(".gguf")
    to_class = TO_GGUF if is_gguf else {theirs: stock for stock, theirs in GGUF_LOADERS.items()}
    for widget in bench.loaders(model):
        here = bench.graph.class_of(widget.node_id)
        if is_gguf == model.file.lower().endswith(".gguf"):
            set_file = bench.widgets.settings({widget: file})
            if not set_file:
                return ()
            changes.extend(set_file)
            continue
        old, new = bench.graph.spec(widget.node_id), bench.vocabulary.get(to_class.get(here, ""))
        if old is None or new is None or widget.input not in new.inputs or new.outputs != old.outputs:
            return ()
        inputs = {name: value for name, value in bench.graph.inputs(widget.node_id).items() if name in new.inputs}
        changes.append(ReplaceNode(widget.node_id, to_class[here], {**new.defaults, **inputs, widget.input: file}))
    return tuple(dict.fromkeys(changes)) if all(isinstance(change, SetInput) for change in changes) else tuple(changes)


def block_swap(bench: Bench, fewer: bool) -> list[Knob]:
    """WanVideoWrapper's blocks_to_swap: more of them to fit, or `fewer` to stream less, the mildest change first."""
    class_type, name = BLOCK_SWAP
    now: dict[Widget, int] = {}
    for node_id in bench.order:
        if bench.graph.class_of(node_id) == class_type:
            value = bench.graph.value(node_id, name)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                now[Widget(node_id, name)] = value
    if not now or bench.widgets.behind(now) is None:
        return []
    layers = [model.arch.layers or MOST_BLOCKS for model in bench.plan.models if model.role == "generator"]
    most, current = min(MOST_BLOCKS, max(layers, default=MOST_BLOCKS)), max(now.values())
    # to stream less the strongest setting still swaps one block less than now
    counts = range(0, current) if fewer else range(min(now.values()) + 1, most + 1)

    def turn(level: int) -> Turn | None:
        blocks = counts[level]
        changes = bench.widgets.settings(
            {widget: min(value, blocks) if fewer else max(value, blocks) for widget, value in now.items()}
        )
        return None if changes is None else Turn(f"Swap {blocks} blocks instead of {current} (blocks_to_swap)", changes)

    if fewer:
        return [Knob("swap_fewer_blocks", "nothing", len(counts), turn)] if counts else []
    return [Knob("swap_blocks", "slower", len(counts), turn)] if counts else []


def _latent_widgets(bench: Bench, names: Sequence[str], above: int, together: bool = False) -> dict[Widget, int]:
    """Inputs of these names at the latents upstream, with their values, where those are known and above `above`."""
    found: dict[Widget, int] = {}
    for node_id in bench.upstream:
        if not any(bench.makes(node_id, kind) for kind in LATENTS) or (together and not bench.has(node_id, *names)):
            continue
        values = {Widget(node_id, name): bench.whole(node_id, name) for name in names if bench.has(node_id, name)}
        if together and None in values.values():
            continue
        found |= {widget: value for widget, value in values.items() if value is not None and value > above}
    return found


def _option(bench: Bench, file: Widget, option: str) -> Widget:
    """The widget of a load option of the file that `file` names."""
    return Widget(file.node_id, option_widget(bench.graph.class_of(file.node_id), file.input, option))


def _base(file: str) -> str:
    return file.replace("\\", "/").rsplit("/", 1)[-1]
