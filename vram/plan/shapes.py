"""How large the pictures and latents on a graph's links are: by types where they tell, by a table of nodes where not.

What ComfyUI's own nodes do is read in nodes.py, comfy_extras/nodes_{wan,images,latent,mask,post_processing,scail}.py (0.33).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from .prompt import Graph, Link
from .sizes import UNKNOWN_SIZE, AtMost, Dim, Size, at_most, combine, more_latent_frames, plain

Rule = Callable[[Graph, str, int], Size]
"""The size at one output of a node: graph, node id, hops from where the question was asked."""

PICTURES: Final = frozenset({"IMAGE", "MASK", "VIDEO"})

LATENTS: Final = frozenset({"LATENT", "WANVIDIMAGE_EMBEDS"})
"""Links that carry a video's size to a sampler; the second is WanVideoWrapper's."""

UPSCALE_MODELS: Final = frozenset({"UPSCALE_MODEL"})

COMPUTING: Final = frozenset({"MODEL", "GUIDER", "VAE", "WANVIDEOMODEL", "WANVAE"})
"""What a node that samples or encodes is linked to: it keeps the size of its latent."""

LENGTH_INPUTS: Final = ("length", "num_frames", "frames", "video_length")
"""Widgets that say how many frames a latent has: types can't tell them from other integers."""

FIRST_FRAME_INPUTS: Final[Mapping[str, str]] = {
    "WanVaceToVideo": "reference_image",
    "WanAnimateToVideo": "",
    "WanAnimate2ToVideo": "",
}
"""Nodes that put one more latent frame before the clip, when this input is linked (`""`: always)."""

MAX_HOPS: Final = 64
"""A size that comes from further away is called unknown: each node costs a few Python frames of its 1000."""


def picture_size(graph: Graph, link: Link, hops: int = 0) -> Size:
    """The pictures on a link of type IMAGE, MASK or VIDEO."""
    return _remembered(graph, link, hops, _picture)


def latent_size(graph: Graph, link: Link, hops: int = 0) -> Size:
    """The video that the latent on a link stands for, in pixels and frames."""
    return _remembered(graph, link, hops, _latent)


def _remembered(graph: Graph, link: Link, hops: int, find: Callable[[Graph, Link, int], Size]) -> Size:
    if link.node_id not in graph.nodes or hops > MAX_HOPS:
        return UNKNOWN_SIZE
    if link not in graph.sizes:
        graph.sizes[link] = UNKNOWN_SIZE  # a link that depends on itself has no size
        graph.sizes[link] = find(graph, link, hops)
    return graph.sizes[link]


def _input(graph: Graph, node_id: str, name: str, hops: int, kind: str = "IMAGE") -> Size:
    link = graph.link(node_id, name)
    if link is None:
        return UNKNOWN_SIZE
    return latent_size(graph, link, hops + 1) if kind == "LATENT" else picture_size(graph, link, hops + 1)


def _first(graph: Graph, node_id: str, kinds: frozenset[str]) -> Link | None:
    return next((link for name, link in graph.links(node_id) if graph.input_type(node_id, name) in kinds), None)


def whole(graph: Graph, node_id: str, name: str) -> Dim:
    """A widget that holds a positive whole number, wherever its value comes from."""
    value = graph.value(node_id, name)
    if isinstance(value, AtMost):
        return value if 0 < value.value < 1 << 24 else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 24:
        return None
    return int(value)


def _number(graph: Graph, node_id: str, name: str) -> float | None:
    value = graph.value(node_id, name)
    if isinstance(value, AtMost):
        value = value.value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        return None
    return float(value)


def _picture(graph: Graph, link: Link, hops: int) -> Size:
    node_id = link.node_id
    class_type = graph.class_of(node_id)
    if class_type in PICTURE_RULES:
        return PICTURE_RULES[class_type](graph, node_id, hops)
    latent = _first(graph, node_id, LATENTS)
    spec = graph.spec(node_id)
    if latent is not None and spec is not None and "VAE" in spec.inputs.values():
        return latent_size(graph, latent, hops + 1)
    enlarging = _first(graph, node_id, UPSCALE_MODELS)
    if enlarging is not None:
        return _upscaled_pictures(graph, node_id, enlarging, hops)
    source = _first(graph, node_id, PICTURES)
    if source is not None:
        return picture_size(graph, source, hops + 1)
    if spec is not None and {"width", "height"} <= set(spec.inputs):
        frames = whole(graph, node_id, "batch_size") if "batch_size" in spec.inputs else 1
        return Size(whole(graph, node_id, "width"), whole(graph, node_id, "height"), frames)
    return UNKNOWN_SIZE


def _file(widget: str) -> Rule:
    def rule(graph: Graph, node_id: str, hops: int) -> Size:
        name = graph.value(node_id, widget)
        found = graph.media(name) if isinstance(name, str) else None
        if found is None:
            return Size(None, None, 1 if widget == "image" else None)
        return Size(found.width, found.height, found.frames)

    return rule


def _resized(graph: Graph, node_id: str, hops: int) -> Size:
    """ImageScale: a side of 0 keeps the picture's proportions."""
    source = _input(graph, node_id, "image", hops)
    return _to_sides(source, _side(graph, node_id, "width"), _side(graph, node_id, "height"))


def _side(graph: Graph, node_id: str, name: str) -> Dim:
    return 0 if graph.value(node_id, name) == 0 else whole(graph, node_id, name)


def _to_sides(source: Size, width: Dim, height: Dim) -> Size:
    if plain(width) == 0 and plain(height) == 0:
        return source
    if plain(width) == 0:
        width = combine(lambda w, h, new: max(1, round(w * new / max(1, h))), source.width, source.height, height)
    elif plain(height) == 0:
        height = combine(lambda w, h, new: max(1, round(h * new / max(1, w))), source.width, source.height, width)
    return source._replace(width=width, height=height)


def _by_factor(source: Size, factor: float | None) -> Size:
    if factor is None or factor <= 0:
        return source._replace(width=None, height=None)
    sides = (combine(lambda side: max(1, round(side * factor)), side) for side in (source.width, source.height))
    return Size(*sides, frames=source.frames)


def _to_pixels(source: Size, pixels: float | None, note: str) -> Size:
    """The same proportions with so many pixels; of unknown proportions it counts as a square, whose memory is the same."""
    if pixels is None or pixels <= 0:
        return source._replace(width=None, height=None)
    width, height = plain(source.width), plain(source.height)
    if not width or not height:
        side = math.isqrt(int(pixels))
        return source._replace(width=AtMost(side, note), height=AtMost(side, note))
    return _by_factor(source, math.sqrt(pixels / (width * height)))


def _to_edge(source: Size, edge: Dim, pick: Callable[[int, int], int]) -> Size:
    """The longer or shorter side becomes `edge`, the other follows."""

    def scaled(mine: int, other: int, new: int) -> float:
        return new if pick(mine, other) == mine else max(1, round(mine / max(1, other) * new))

    return source._replace(
        width=combine(scaled, source.width, source.height, edge), height=combine(scaled, source.height, source.width, edge)
    )


def _resize_any(graph: Graph, node_id: str, hops: int) -> Size:
    """ResizeImageMaskNode, by its kind of resizing."""
    link = graph.link(node_id, "input")
    source = picture_size(graph, link, hops + 1) if link else UNKNOWN_SIZE
    kind, title = graph.value(node_id, "resize_type"), graph.title(node_id)

    def dim(name: str) -> Dim:
        return _side(graph, node_id, f"resize_type.{name}")

    match kind:
        case "scale dimensions":
            return _to_sides(source, dim("width"), dim("height"))
        case "scale by multiplier":
            return _by_factor(source, _number(graph, node_id, "resize_type.multiplier"))
        case "scale width":
            return _to_sides(source, dim("width"), 0)
        case "scale height":
            return _to_sides(source, 0, dim("height"))
        case "scale longer dimension":
            if None in (source.width, source.height) and (edge := plain(dim("longer_size"))):
                bound = AtMost(edge, f"{title} makes pictures of at most {edge}×{edge}, whatever it is given")
                return source._replace(width=bound, height=bound)
            return _to_edge(source, dim("longer_size"), max)
        case "scale shorter dimension":
            return _to_edge(source, dim("shorter_size"), min)
        case "scale total pixels":
            mega = _number(graph, node_id, "resize_type.megapixels")
            note = f"the proportions of what {title} resizes are not known; it counts as a square of {mega} megapixels"
            return _to_pixels(source, None if mega is None else int(mega * 1024 * 1024), note)
        case "match size":
            other = _input(graph, node_id, "resize_type.match", hops)
            return source._replace(width=other.width, height=other.height)
        case "scale to multiple":
            multiple = plain(dim("multiple")) or 1
            sides = (combine(lambda side: side // multiple * multiple or side, s) for s in (source.width, source.height))
            return Size(*sides, frames=source.frames)
    return source._replace(width=None, height=None)


def _total_pixels(graph: Graph, node_id: str, hops: int) -> Size:
    mega = _number(graph, node_id, "megapixels")
    note = f"the proportions of what {graph.title(node_id)} resizes are not known; it counts as a square"
    return _to_pixels(_input(graph, node_id, "image", hops), None if mega is None else int(mega * 1024 * 1024), note)


def _from_batch(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "image", hops)
    length = whole(graph, node_id, "length")
    start = _number(graph, node_id, "batch_index") or 0
    if start > 0 and source.frames is not None:
        source = source._replace(frames=combine(lambda count: max(1, count - start), source.frames))
    note = f"{graph.title(node_id)} passes on at most {plain(length)} frames, however many its input has; so many count"
    return source._replace(frames=at_most(length, source.frames, note))


def _repeated(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "image", hops)
    return source._replace(frames=combine(lambda a, b: a * b, source.frames, whole(graph, node_id, "amount")))


def _joined(graph: Graph, node_id: str, hops: int) -> Size:
    """Batches of pictures one after the other, all at the first one's size."""
    links = [link for name, link in graph.links(node_id) if graph.input_type(node_id, name) in PICTURES]
    sizes = [picture_size(graph, link, hops + 1) for link in links]
    if not sizes:
        return UNKNOWN_SIZE
    return sizes[0]._replace(frames=combine(lambda *counts: sum(counts), *(size.frames for size in sizes)))


def _padded(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "image", hops)
    left, top, right, bottom = (int(_number(graph, node_id, name) or 0) for name in ("left", "top", "right", "bottom"))
    return source._replace(
        width=combine(lambda side: side + left + right, source.width),
        height=combine(lambda side: side + top + bottom, source.height),
    )


def _stitched(graph: Graph, node_id: str, hops: int) -> Size:
    first = _input(graph, node_id, "image1", hops)
    if graph.link(node_id, "image2") is None:
        return first
    second = _input(graph, node_id, "image2", hops)
    gap = int(_number(graph, node_id, "spacing_width") or 0)
    frames = combine(max, first.frames, second.frames)
    beside = graph.value(node_id, "direction") in ("left", "right")
    if graph.value(node_id, "match_image_size") is not False:
        # the second is scaled to the first's other side
        if beside:
            wide = combine(lambda w, h, to: w * to / max(1, h), second.width, second.height, first.height)
            return Size(combine(lambda a, b: a + b + gap, first.width, wide), first.height, frames)
        tall = combine(lambda w, h, to: h * to / max(1, w), second.width, second.height, first.width)
        return Size(first.width, combine(lambda a, b: a + b + gap, first.height, tall), frames)
    if beside:
        return Size(
            combine(lambda a, b: a + b + gap, first.width, second.width), combine(max, first.height, second.height), frames
        )
    return Size(combine(max, first.width, second.width), combine(lambda a, b: a + b + gap, first.height, second.height), frames)


UPSCALES: Final = re.compile(r"(?<![a-z0-9])(?:x([248])|([248])x)(?!\d)", re.IGNORECASE)
"""How an upscale model's file says what it does: `4x-UltraSharp`, `RealESRGAN_x4plus`."""


def _upscaled_pictures(graph: Graph, node_id: str, link: Link, hops: int) -> Size:
    """By an upscale model: as its file's name says, or nobody knows."""
    source = _first(graph, node_id, PICTURES)
    given = picture_size(graph, source, hops + 1) if source is not None else UNKNOWN_SIZE
    names = (graph.value(link.node_id, name) for name in graph.inputs(link.node_id)) if link.node_id in graph.nodes else ()
    found = next((match for name in names if isinstance(name, str) and (match := UPSCALES.search(name))), None)
    if found is None:
        return given._replace(width=None, height=None)
    factor = int(found[1] or found[2])
    graph.assumed[f"{graph.title(node_id)} makes pictures {factor} times as wide and high, as the name of its model says"] = (
        None
    )
    return _by_factor(given, factor)


def _video_file(graph: Graph, node_id: str, hops: int) -> Size:
    """VideoHelperSuite's loaders: a side of 0 keeps the proportions, a cap of 0 takes all frames."""
    size = _to_sides(
        _file("video")(graph, node_id, hops), _side(graph, node_id, "custom_width"), _side(graph, node_id, "custom_height")
    )
    nth, skipped = _number(graph, node_id, "select_every_nth") or 1, _number(graph, node_id, "skip_first_frames") or 0
    frames = combine(lambda count: max(1, math.ceil((count - skipped) / max(1, nth))), size.frames)
    if (_number(graph, node_id, "force_rate") or 0) > 0:
        frames = None  # how many frames that makes depends on the file's own rate
    cap = whole(graph, node_id, "frame_load_cap")
    note = f"{graph.title(node_id)} loads at most {plain(cap)} frames; so many count"
    return size._replace(frames=frames if cap is None else at_most(cap, frames, note))


def _canvas(graph: Graph, node_id: str, hops: int) -> Size:
    """Its own width and height; of one frame, or as many as `batch_size` says."""
    spec = graph.spec(node_id)
    frames = whole(graph, node_id, "batch_size") if spec is not None and "batch_size" in spec.inputs else 1
    return Size(whole(graph, node_id, "width"), whole(graph, node_id, "height"), frames)


def _cropped(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "image", hops)
    note = f"{graph.title(node_id)} crops to at most its own size"
    return source._replace(
        width=at_most(whole(graph, node_id, "width"), source.width, note),
        height=at_most(whole(graph, node_id, "height"), source.height, note),
    )


PICTURE_RULES: Final[Mapping[str, Rule]] = {
    "LoadImage": _file("image"),
    "LoadImageMask": _file("image"),
    "LoadImageOutput": _file("image"),
    "LoadVideo": _file("file"),
    "VHS_LoadVideo": _video_file,
    "VHS_LoadVideoPath": _video_file,
    "VHS_LoadVideoFFmpeg": _video_file,
    "EmptyImage": _canvas,
    "SolidMask": _canvas,
    "ImageScale": _resized,
    "ImageScaleBy": lambda g, n, hops: _by_factor(_input(g, n, "image", hops), _number(g, n, "scale_by")),
    "ImageScaleToTotalPixels": _total_pixels,
    "ImageScaleToMaxDimension": lambda g, n, hops: _to_edge(_input(g, n, "image", hops), whole(g, n, "largest_size"), max),
    "ResizeImageMaskNode": _resize_any,
    "ResizeAndPadImage": lambda g, n, hops: _input(g, n, "image", hops)._replace(
        width=whole(g, n, "target_width"), height=whole(g, n, "target_height")
    ),
    "ImageFromBatch": _from_batch,
    "RepeatImageBatch": _repeated,
    "BatchImagesNode": _joined,
    "ImageBatch": _joined,
    "ImagePadForOutpaint": _padded,
    "ImageStitch": _stitched,
    "ImageCrop": _cropped,
}
"""Nodes whose pictures differ in size from what they are given. All others pass on the size of their first picture."""


def _latent(graph: Graph, link: Link, hops: int) -> Size:
    node_id = link.node_id
    class_type = graph.class_of(node_id)
    if class_type in LATENT_RULES:
        return LATENT_RULES[class_type](graph, node_id, hops)
    return work_size(graph, node_id, hops)


def work_size(graph: Graph, node_id: str, hops: int = 0) -> Size:
    """The size a node works at: what its own widgets say, and for the rest that of the latent or picture it is given."""
    spec = graph.spec(node_id)
    inputs = {*graph.inputs(node_id), *(spec.inputs if spec else ())}
    sides = {"width", "height"} <= inputs
    length = next((name for name in LENGTH_INPUTS if name in inputs), None)
    source = _first(graph, node_id, LATENTS)
    if source is not None:
        _note_what_may_change(graph, node_id)
        given = latent_size(graph, source, hops + 1)
    elif sides:
        given = Size(frames=1)
    else:
        picture = _first(graph, node_id, PICTURES)
        given = picture_size(graph, picture, hops + 1) if picture is not None else UNKNOWN_SIZE
    size = given
    if sides:
        size = size._replace(width=whole(graph, node_id, "width"), height=whole(graph, node_id, "height"))
    if length is not None:
        size = size._replace(frames=whole(graph, node_id, length))
    if "batch_size" in inputs:
        size = size._replace(batch=whole(graph, node_id, "batch_size"))
    before = FIRST_FRAME_INPUTS.get(graph.class_of(node_id))
    if before is not None and (before == "" or graph.link(node_id, before) is not None):
        size = size._replace(frames=more_latent_frames(size.frames, 1))
    return size


def _note_what_may_change(graph: Graph, node_id: str) -> None:
    spec = graph.spec(node_id)
    if spec is None or graph.class_of(node_id) in KEEP_THEIR_LATENT:
        return
    linked = {graph.input_type(node_id, name) for name, _ in graph.links(node_id)}
    if linked & COMPUTING or "LATENT" not in spec.outputs or {"width", "height"} <= set(spec.inputs):
        return
    graph.assumed[f"{graph.title(node_id)} may change the size of its latent; it counts as unchanged"] = None


def _upscaled(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "samples", hops, "LATENT")
    scaled = _by_factor(source, _number(graph, node_id, "scale_by"))
    return source._replace(width=scaled.width, height=scaled.height)


def _trimmed(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "samples", hops, "LATENT")
    amount = _number(graph, node_id, "trim_amount")
    if amount is None:
        graph.assumed[f"how much {graph.title(node_id)} trims is not known; the whole latent counts"] = None
        return source
    return source._replace(frames=more_latent_frames(source.frames, -int(amount)))


def _along(size: Size, direction: object, change: Callable[[Dim], Dim]) -> Size:
    axis = {"x": "width", "y": "height", "t": "frames"}.get(str(direction).strip("-"))
    return size if axis is None else size._replace(**{axis: change(getattr(size, axis))})


def _concatenated(graph: Graph, node_id: str, hops: int) -> Size:
    first = _input(graph, node_id, "samples1", hops, "LATENT")
    second = _input(graph, node_id, "samples2", hops, "LATENT")
    direction = graph.value(node_id, "dim")
    if str(direction).strip("-") == "t":
        # a clip of 4t - 3 frames has t latent frames
        return first._replace(frames=combine(lambda a, b: a + b + 3, first.frames, second.frames))
    other = second.width if str(direction).strip("-") == "x" else second.height
    return _along(first, direction, lambda side: combine(lambda a, b: a + b, side, other))


def _cut(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "samples", hops, "LATENT")
    amount = whole(graph, node_id, "amount")
    direction = graph.value(node_id, "dim")
    if direction == "t":
        return source._replace(frames=combine(lambda f, n: min(f, 4 * n - 3), source.frames, amount))
    return _along(source, direction, lambda side: combine(lambda s, n: min(s, n * 8), side, amount))


def _cut_to_batch(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "samples", hops, "LATENT")
    size = whole(graph, node_id, "slice_size")
    if graph.value(node_id, "dim") != "t":
        return source
    steps = combine(lambda f: (f - 1) // 4 + 1, source.frames)
    return source._replace(
        frames=combine(lambda t, n: 4 * min(t, n) - 3, steps, size),
        batch=combine(lambda b, t, n: b * max(1, t // n), source.batch, steps, size),
    )


def _repeated_latent(graph: Graph, node_id: str, hops: int) -> Size:
    source = _input(graph, node_id, "samples", hops, "LATENT")
    return source._replace(batch=combine(lambda a, b: a * b, source.batch, whole(graph, node_id, "amount")))


LATENT_RULES: Final[Mapping[str, Rule]] = {
    "LatentUpscaleBy": _upscaled,
    "TrimVideoLatent": _trimmed,
    "LatentConcat": _concatenated,
    "LatentCut": _cut,
    "LatentCutToBatch": _cut_to_batch,
    "RepeatLatentBatch": _repeated_latent,
}
"""Nodes whose latent differs in size from the one they are given, and no widget of theirs says so by its name."""

KEEP_THEIR_LATENT: Final = frozenset(
    {"SetLatentNoiseMask", "LatentMultiply", "LatentAdd", "LatentSubtract", "LatentBlend", "AddNoise", "LatentFlip"}
)


def _picture_side(axis: str) -> Callable[[Graph, str], Dim]:
    return lambda graph, node_id: getattr(_input(graph, node_id, "image", 0), axis)


def _linked_adds_one(graph: Graph, node_id: str) -> Dim:
    before = FIRST_FRAME_INPUTS[graph.class_of(node_id)]
    return int(before == "" or graph.link(node_id, before) is not None)


def _index(graph: Graph, node_id: str) -> Dim:
    """Which of its options a CustomCombo has chosen; the widget lies beside the declared ones."""
    value = graph.inputs(node_id).get("index", 0)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 24 else None


MEASURES: Final[Mapping[tuple[str, int], Callable[[Graph, str], Dim]]] = {
    ("GetImageSize", 0): _picture_side("width"),
    ("GetImageSize", 1): _picture_side("height"),
    ("GetImageSize", 2): _picture_side("frames"),
    ("CustomCombo", 1): _index,
    ("WanCameraEmbedding", 1): lambda graph, node_id: whole(graph, node_id, "width"),
    ("WanCameraEmbedding", 2): lambda graph, node_id: whole(graph, node_id, "height"),
    ("WanCameraEmbedding", 3): lambda graph, node_id: whole(graph, node_id, "length"),
    ("WanVaceToVideo", 3): _linked_adds_one,
    ("WanAnimateToVideo", 3): _linked_adds_one,
    ("WanAnimate2ToVideo", 3): _linked_adds_one,
}
"""Integer outputs (class, slot) that say a size: what they will give when they run."""
