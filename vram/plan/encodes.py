"""What a node encodes with the VAE it is given: types can't tell how long a clip it makes of one picture.

Read in ComfyUI's comfy_extras/nodes_{wan,wanmove,wandancer,scail}.py (0.33).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from .prompt import Graph
from .shapes import LENGTH_INPUTS, PICTURES, picture_size, whole, work_size
from .sizes import Dim, Size, at_most, combine, plain

Frames = str | int


class Encode(NamedTuple):
    """One call of `vae.encode`."""

    picture: str
    """The input that must be linked for it; empty: it happens always."""
    frames: Frames
    """`length`: padded to the node's length; `one`; `given`: what is linked, cut to the length; a number; or the widget that
    has it."""
    shrink: int = 1
    """Sides are divided by this first."""


ENCODES: Final[Mapping[str, tuple[Encode, ...]]] = {
    "WanImageToVideo": (Encode("start_image", "length"),),
    "WanFirstLastFrameToVideo": (Encode("", "length"),),
    "WanFunInpaintToVideo": (Encode("", "length"),),
    "WanFunControlToVideo": (Encode("start_image", "given"), Encode("control_video", "given")),
    "Wan22FunControlToVideo": (Encode("ref_image", "one"), Encode("control_video", "given")),
    "WanVaceToVideo": (Encode("reference_image", "one"), Encode("", "length"), Encode("", "length")),
    "WanCameraImageToVideo": (Encode("start_image", "given"),),
    "WanPhantomSubjectToVideo": (Encode("images", "one"),),
    "WanTrackToVideo": (Encode("start_image", "length"),),
    "WanMoveTrackToVideo": (Encode("start_image", "length"),),
    "WanSoundImageToVideo": (Encode("ref_image", "one"), Encode("ref_motion", 73), Encode("control_video", "given")),
    "WanSoundImageToVideoExtend": (Encode("ref_image", "one"), Encode("control_video", "given")),
    "WanHuMoImageToVideo": (Encode("ref_image", "one"),),
    "WanAnimateToVideo": (Encode("", "one"), Encode("pose_video", "length"), Encode("", "length")),
    "WanAnimate2ToVideo": (Encode("", "one"), Encode("", "length"), Encode("pose_video", "length")),
    "Wan22ImageToVideoLatent": (Encode("start_image", "given"),),
    "WanInfiniteTalkToVideo": (Encode("start_image", "length"), Encode("previous_frames", "motion_frame_count")),
    "WanSCAILToVideo": (
        Encode("reference_image", "one"),
        Encode("pose_video", "given", shrink=2),
        Encode("previous_frames", "previous_frame_count"),
    ),
    "WanDancerVideo": (Encode("start_image", "length"),),
}


def encodes(graph: Graph, node_id: str) -> tuple[Size, ...]:
    """The clips that a node which is given a VAE and makes latents or conditioning encodes, one after the other."""
    class_type = graph.class_of(node_id)
    if class_type in ENCODES:
        return tuple(
            _size(graph, node_id, encode)
            for encode in ENCODES[class_type]
            if not encode.picture or graph.link(node_id, encode.picture) is not None
        )
    linked = [(name, link) for name, link in graph.links(node_id) if graph.input_type(node_id, name) in PICTURES]
    if not linked:
        return ()
    spec = graph.spec(node_id)
    inputs = {*graph.inputs(node_id), *(spec.inputs if spec else ())}
    if not any(name in inputs for name in LENGTH_INPUTS):
        own = {"width", "height"} <= inputs
        size = work_size(graph, node_id) if own else picture_size(graph, linked[0][1])
        return (size._replace(frames=picture_size(graph, linked[0][1]).frames if own else size.frames, batch=1),)
    # a node nobody read: a reference picture is encoded by itself, anything else as a clip of full length
    frames: Frames = "one" if all(name.startswith("ref") for name, _ in linked) else "length"
    return (_size(graph, node_id, Encode(linked[0][0], frames)),)


def largest(clips: tuple[Size, ...]) -> Size:
    """The clip that takes most memory: an unknown one before all others, since it may be."""

    def weight(size: Size) -> float:
        sides = (plain(size.width), plain(size.height), plain(size.frames))
        if None in sides:
            return float("inf")
        width, height, frames = (side or 0 for side in sides)
        # the encoder goes chunk by chunk: a picture takes about a fifth of a clip, a longer clip hardly more than a short one
        return width * height * (0.2 if frames == 1 else 1 + frames / 10_000)

    return max(clips, key=weight)


def _size(graph: Graph, node_id: str, encode: Encode) -> Size:
    # the node's own widgets, without the latent frame that some put before the clip
    length = next((name for name in LENGTH_INPUTS if name in graph.inputs(node_id)), None)
    clip = whole(graph, node_id, length) if length else work_size(graph, node_id).frames
    size = work_size(graph, node_id)
    sides = (combine(lambda side: side // encode.shrink, side) for side in (size.width, size.height))
    return Size(*sides, frames=_frames(graph, node_id, encode, clip), batch=1)


def _frames(graph: Graph, node_id: str, encode: Encode, clip: Dim) -> Dim:
    if isinstance(encode.frames, int):
        return encode.frames
    if encode.frames == "one":
        return 1
    link = graph.link(node_id, encode.picture) if encode.picture else None
    if encode.frames == "length" or link is None:
        return clip
    if encode.frames != "given":
        clip = whole(graph, node_id, encode.frames)
    note = f"{graph.title(node_id)} encodes at most {plain(clip)} frames of {encode.picture}; so many count"
    return at_most(clip, picture_size(graph, link).frames, note)
