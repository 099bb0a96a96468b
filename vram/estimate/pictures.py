"""What nodes that compute on pictures with the card, but without any model, need there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class PictureWork(NamedTuple):
    """Bytes per pixel of a node that ComfyUI runs on the card."""

    per_pixel: int
    """Of every frame, where all frames are computed at once; else of one."""
    all_frames: bool


PICTURE_WORK: Final[Mapping[str, PictureWork]] = {
    "Canny": PictureWork(172, all_frames=True),
    "ColorTransfer": PictureWork(195, all_frames=False),
}
"""Measured by counting live tensors while the real nodes of ComfyUI 0.33 ran on small pictures (torch 2.13, float32):

Canny takes 160.2 to 160.8 bytes per pixel and frame for 1 to 8 frames of 64 to 256 px, and the picture's copy of 12 beside it
(comfy_extras/nodes_canny.py). ColorTransfer goes frame by frame: 171 bytes per pixel, and 24 for the frame that is written."""


def picture_bytes(class_type: str, width: int, height: int, frames: int) -> int | None:
    """Bytes a picture node needs on the card at this size; None for a node that is not known to compute there."""
    work = PICTURE_WORK.get(class_type)
    if work is None:
        return None
    return work.per_pixel * width * height * (frames if work.all_frames else 1)
