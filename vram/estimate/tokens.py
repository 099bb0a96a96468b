"""The shape of a video: as nodes round it, as a latent, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

MOST_PIXELS: Final = 1 << 20
"""Of a side: far above any node's widget (MAX_RESOLUTION is 16384 in ComfyUI nodes.py), so that arithmetic stays exact."""

MOST_FRAMES: Final = 1 << 20
"""Of a clip, for the same reason."""

MOST_BATCH: Final = 1 << 16
"""Of clips at once (ComfyUI's widgets end at 4096)."""

TEMPORAL_STRIDE: Final = 4
"""Frames of one latent frame after the first, which stands for one (both WAN VAEs, comfy/sd.py upscale_ratio: a * 4 - 3)."""

PATCH: Final = 2
"""Latent cells of a token in each direction of the picture, one in time: patch size (1, 2, 2) in every WAN."""


def whole(name: str, value: object, least: int = 0, most: int = 1 << 62) -> int:
    """`value` as an int between `least` and `most`. Raises ValueError that names the argument for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {short(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {short(value)}")
    return int(value)


def one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raises ValueError that names the argument unless `value` is one of `known`."""
    if not any(type(value) is type(one) and value == one for one in known):
        raise ValueError(f"{name} must be one of {', '.join(str(one) for one in known)}, not {short(value)}")


def typed(name: str, value: object, kind: type) -> None:
    """Raises ValueError that names the argument unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, not {short(value)}")


def flag(name: str, value: object) -> bool:
    """Raises ValueError that names the argument unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {short(value)}")
    return value


def short(value: object) -> str:
    """A value as a message shows it."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a far larger number"
    try:
        text = repr(value)
    except ValueError:  # Python does not write out numbers of thousands of digits
        return f"that {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


class Latent(NamedTuple):
    """Cells of a latent video."""

    batch: int
    frames: int
    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """Of the whole batch, for one channel."""
        return self.batch * self.frames * self.rows * self.columns

    @property
    def tokens_per_frame(self) -> int:
        """ComfyUI pads odd sides to a whole patch (comfy/ldm/common_dit.py, pad_to_patch_size)."""
        return -(-self.rows // PATCH) * -(-self.columns // PATCH)

    @property
    def tokens(self) -> int:
        """Of one clip of the batch."""
        return self.frames * self.tokens_per_frame

    @property
    def padded_cells(self) -> int:
        """Cells of the whole batch after padding to whole patches, for one channel."""
        return self.batch * self.tokens * PATCH * PATCH


@dataclass(frozen=True, slots=True)
class Video:
    """Pixels, frames and clips as a node is given them. Raises ValueError that names what is no number from 0 up."""

    width: int
    height: int
    frames: int = 81
    batch: int = 1

    def __post_init__(self) -> None:
        whole("width", self.width, 0, MOST_PIXELS)
        whole("height", self.height, 0, MOST_PIXELS)
        whole("frames", self.frames, 0, MOST_FRAMES)
        whole("batch", self.batch, 1, MOST_BATCH)

    @property
    def pixels(self) -> int:
        """Of one frame."""
        return self.width * self.height

    def latent(self, stride: int = 8) -> Latent:
        """The latent that nodes make of it: sides and frames are rounded down (comfy_extras/nodes_wan.py: height // stride,
        (length - 1) // 4 + 1), so a clip of no frame or a side below one cell is an empty one."""
        whole("stride", stride, 1, 64)
        return Latent(self.batch, latent_frames(self.frames), self.height // stride, self.width // stride)

    def rounded(self, stride: int = 8) -> Video:
        """The video that comes out: 4n + 1 frames, sides of whole tokens as the widgets step (16 pixels, for the 5B 32)."""
        side = PATCH * whole("stride", stride, 1, 64)
        frames = video_frames(latent_frames(self.frames))
        return Video(self.width // side * side, self.height // side * side, frames, self.batch)


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames`: 1 of 1 to 4, 2 of 5 to 8; 0 of 0. Raises ValueError that names `frames`."""
    return (whole("frames", frames, 0, MOST_FRAMES) - 1) // TEMPORAL_STRIDE + 1


def video_frames(latent: int) -> int:
    """Frames that `latent` frames are decoded to. Raises ValueError that names `latent`."""
    return max(0, whole("latent", latent, 0, MOST_FRAMES) * TEMPORAL_STRIDE - (TEMPORAL_STRIDE - 1))
