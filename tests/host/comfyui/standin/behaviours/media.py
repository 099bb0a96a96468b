"""Images and videos: read for their size, written small. The stand-in has no codec, so a video is an animated PNG."""

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import folder_paths
import torch
from torch.nn import functional as F  # noqa: N812

from . import node

LARGEST_SIDE = 192
MOST_FRAMES = 24


class Video(NamedTuple):
    images: torch.Tensor
    fps: float


# Writing.


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: str, frames: torch.Tensor, fps: float = 16.0) -> None:
    """(frames, height, width, 3) in 0..1 as a PNG; more than one frame makes it an animated one."""
    small = frames[:: -(-frames.shape[0] // MOST_FRAMES), :, :, :3].movedim(-1, 1)
    scale = LARGEST_SIDE / max(LARGEST_SIDE, *small.shape[-2:])
    size = [max(1, round(side * scale)) for side in small.shape[-2:]]
    pixels = F.interpolate(small, size=size).movedim(1, -1).mul(255).clamp(0, 255).to(torch.uint8)
    count, height, width, _ = pixels.shape
    rows = F.pad(pixels.reshape(count, height, width * 3), (1, 0))  # a leading 0: no filter
    packed = [zlib.compress(frame.numpy().tobytes(), 6) for frame in rows]
    step = (100, max(1, round(100 * fps * count / frames.shape[0])))
    out = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if count > 1:
        out.append(_chunk(b"acTL", struct.pack(">II", count, 0)))
    sequence = 0
    for index, data in enumerate(packed):
        if count > 1:
            control = struct.pack(">IIIIIHHBB", sequence, width, height, 0, 0, *step, 0, 0)
            out.append(_chunk(b"fcTL", control))
            sequence += 1
        if index == 0:
            out.append(_chunk(b"IDAT", data))
        else:
            out.append(_chunk(b"fdAT", struct.pack(">I", sequence) + data))
            sequence += 1
    out.append(_chunk(b"IEND", b""))
    with open(path, "wb") as file:
        file.write(b"".join(out))


def _save(frames: Sequence[torch.Tensor], prefix: str, kind: str, fps: float = 16.0) -> list[dict[str, str]]:
    """One file per item, in the output or temp folder, with ComfyUI's numbering."""
    root = folder_paths.get_directory_by_type(kind) or folder_paths.get_output_directory()
    height, width = frames[0].shape[-3:-1]
    folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    saved = []
    for offset, frame in enumerate(frames):
        file = f"{name}_{number + offset:05}_.png"
        write_png(os.path.join(folder, file), frame if frame.ndim == 4 else frame[None], fps)
        saved.append({"filename": file, "subfolder": subfolder, "type": kind})
    return saved


@node("SaveImage", "save_images")
def save_image(
    images: torch.Tensor, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
) -> dict[str, Any]:
    return {"ui": {"images": _save(list(images), filename_prefix, "output")}, "result": (images,)}


@node("PreviewImage", "save_images")
def preview_image(images: torch.Tensor, prompt: Any = None, extra_pnginfo: Any = None) -> dict[str, Any]:
    return {"ui": {"images": _save(list(images), "ComfyUI_temp", "temp")}, "result": (images,)}


@node("SaveAnimatedWEBP", "save_images")
def save_animated(images: torch.Tensor, filename_prefix: str, fps: float, **options: Any) -> dict[str, Any]:
    ui = {"images": _save([images], filename_prefix, "output", fps), "animated": (images.shape[0] != 1,)}
    return {"ui": ui, "result": (images,)}


@node("CreateVideo")
def create_video(images: torch.Tensor, fps: float, audio: Any = None, bit_depth: int = 8) -> tuple[Video]:
    return (Video(images, fps),)


@node("SaveVideo")
def save_video(video: Video, filename_prefix: str, **options: Any) -> dict[str, Any]:
    ui = {"images": _save([video.images], filename_prefix, "output", video.fps), "animated": (True,)}
    return {"ui": ui, "result": (video,)}


@node("GetVideoComponents")
def get_video_components(video: Video) -> tuple[torch.Tensor, None, float]:
    return video.images, None, video.fps


# Reading.


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG, JPEG, GIF or WebP file. Its pixels are not decoded."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return struct.unpack(">II", data[16:24])
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return struct.unpack("<HH", data[6:10])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if data[12:16] == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if data[:2] == b"\xff\xd8":
        place = 2
        while place + 9 < len(data):
            marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width = struct.unpack(">HH", data[place + 5 : place + 9])
                return width, height
            place += 2 + length
    raise ValueError("not a PNG, JPEG, GIF or WebP image")


def _changed(cls: type, image: str) -> str:
    with open(folder_paths.get_annotated_filepath(image), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _valid(cls: type, image: str) -> bool | str:
    return True if folder_paths.exists_annotated_filepath(image) else f"Invalid image file: {image}"


@node("LoadImage", "load_image", IS_CHANGED=_changed, VALIDATE_INPUTS=_valid)
def load_image(image: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of the file's size in one colour that its content decides."""
    with open(folder_paths.get_annotated_filepath(image), "rb") as file:
        data = file.read()
    width, height = image_size(data)
    colour = torch.tensor(list(hashlib.sha256(data).digest()[:3])).float() / 255
    return colour.expand(1, height, width, 3).clone(), torch.zeros(1, 64, 64)


@node("EmptyImage", "generate")
def empty_image(width: int, height: int, batch_size: int = 1, color: int = 0) -> tuple[torch.Tensor]:
    rgb = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]).float() / 255
    return (rgb.expand(batch_size, height, width, 3).clone(),)


@node("ImageScale", "upscale")
def image_scale(image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str) -> tuple[torch.Tensor]:
    size = (height or image.shape[1], width or image.shape[2])
    return (F.interpolate(image.movedim(-1, 1), size=size).movedim(1, -1),)


@node("GetImageSize", "get_size")
def get_image_size(image: torch.Tensor, unique_id: Any = None) -> tuple[int, int, int]:
    return image.shape[2], image.shape[1], image.shape[0]
