"""Sizes of input files, from real files made by the libraries ComfyUI reads them with."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from vram_headroom.vram.estimate.media import ORIENTATION, MediaSize, read_picture, read_video


def write_video(path: Path, width: int, height: int, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(16))
        stream.width, stream.height = width, height
        for index in range(frames):
            picture = np.full((height, width, 3), index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_picture_tells_its_sides(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (832, 480)).save(path)
    assert read_picture(str(path)) == MediaSize(832, 480, 1)


def test_a_picture_lying_on_its_side_is_as_it_will_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (64, 32)).save(path, exif=exif)
    assert read_picture(str(path)) == MediaSize(32, 64, 1)


def test_an_animation_tells_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    frames = [Image.new("RGB", (16, 8), color=(50 * index, 0, 0)) for index in range(5)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_picture(str(path)) == MediaSize(16, 8, 5)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "avi"])
def test_a_video_tells_its_sides_and_frames_without_being_decoded(tmp_path: Path, ending: str) -> None:
    path = write_video(tmp_path / f"a.{ending}", 96, 64, 33)
    assert read_video(str(path)) == MediaSize(96, 64, 33)


def test_what_cannot_be_read_has_no_size(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert read_picture(str(broken)) is None
    assert read_video(str(broken)) is None
    assert read_picture(str(tmp_path / "gone.png")) is None
    assert read_video(str(tmp_path / "gone.mp4")) is None
