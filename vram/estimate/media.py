"""The size of a picture or a video, read from its header with the libraries ComfyUI ships and reads it with itself."""

from __future__ import annotations

from typing import Final, NamedTuple


class MediaSize(NamedTuple):
    """What the header of an input picture or video says."""

    width: int
    height: int
    frames: int | None
    """None where only decoding would tell."""


ROTATED: Final = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height; ComfyUI's LoadImage follows them (nodes.py, ImageOps.exif_transpose)."""

ORIENTATION: Final = 274
"""The EXIF tag of it (EXIF 2.3, table 4)."""


def read_picture(path: str) -> MediaSize | None:
    """Width, height and frames of a picture; only its header is read."""
    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.getexif().get(ORIENTATION) in ROTATED:
                width, height = height, width
            return MediaSize(width, height, int(getattr(picture, "n_frames", 1)))
    except Exception:
        # whatever a format's plugin raises: ComfyUI will say what is wrong with the file when it loads it
        return None


def read_video(path: str) -> MediaSize | None:
    """Width, height and, where the container says, frames of a video; nothing is decoded."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            frames = int(stream.frames)
            if not frames and stream.duration and stream.time_base and stream.average_rate:
                frames = round(float(stream.duration * stream.time_base) * float(stream.average_rate))
            if not frames and container.duration and stream.average_rate:
                frames = round(container.duration / av.time_base * float(stream.average_rate))
            width, height = int(stream.width), int(stream.height)
            return MediaSize(width, height, frames or None) if width and height else None
    except Exception:
        # as for pictures: a file PyAV cannot open is one ComfyUI cannot either
        return None
