"""Decoding and encoding in tiles: on purpose (VAEDecodeTiled), or as ComfyUI falls back to it after running out of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, NamedTuple

from .backend import Backend
from .corrections import checked, version_of
from .estimate import Estimate
from .tokens import Latent, Video, flag, latent_frames, one_of, typed, video_frames, whole
from .vae import CHANNELS, KINDS, STRIDES, VaeKind, host_decode_required, vae_decode, vae_encode

GROWING: Final[tuple[int, int, int]] = (0, 32, 0)
"""First ComfyUI whose fallback sizes its tiles by the card (commit 57ce8e1a); before, a tile is 256 pixels and as long as the
clip."""

FALLBACK_PIXELS: Final = 256
"""Side of the fallback's first tile (comfy/sd.py, VAE.decode and encode, 0.8 and 0.33)."""

BUDGET_PERCENT: Final = 80
"""Of the card, the most that the fallback plans with (comfy/sd.py, VAE.decode, 0.33)."""


class Tile(NamedTuple):
    """One tile in cells of the latent; the last ones of a row may be smaller."""

    frames: int
    rows: int
    columns: int


def decode_tile(
    kind: VaeKind, *, tile_size: int = 512, overlap: int = 64, temporal_size: int = 64, temporal_overlap: int = 8
) -> Tile:
    """The tile of VAEDecodeTiled's widgets, in cells (nodes.py, VAEDecodeTiled, 0.8 and 0.33). The overlaps change how many
    tiles there are, not how large one is. Raises ValueError that names an argument out of range."""
    one_of("kind", kind, KINDS)
    whole("tile_size", tile_size, 1, 1 << 20)
    whole("overlap", overlap, 0, 1 << 20)
    whole("temporal_size", temporal_size, 1, 1 << 20)
    whole("temporal_overlap", temporal_overlap, 0, 1 << 20)
    side = max(1, tile_size // STRIDES[kind])
    return Tile(max(2, temporal_size // 4), side, side)


def encode_tile(kind: VaeKind, *, tile_size: int = 512, temporal_size: int | None = 64) -> Tile:
    """The tile of VAEEncodeTiled's widgets, in cells; None: as long as the clip.

    Raises ValueError that names an argument out of range.
    """
    one_of("kind", kind, KINDS)
    whole("tile_size", tile_size, 1, 1 << 20)
    side = max(1, tile_size // STRIDES[kind])
    if temporal_size is None:
        return Tile(1 << 20, side, side)
    return Tile(max(2, (whole("temporal_size", temporal_size, 1, 1 << 20) + 3) // 4), side, side)


def fallback_tile(
    kind: VaeKind, latent: Latent, *, card_total: int, comfyui: tuple[int, int, int] | None = None, element_bytes: int = 2
) -> Tile:
    """The tile that a decode falls back to after it ran out of memory: the version's own loop, replayed.

    From GROWING on it starts at 256 pixels and the whole clip, halves the clip until one tile fits into 80 % of the card or
    into what the whole decode would have got, then doubles its side while that still fits (comfy/sd.py, VAE.decode, 0.33).
    Raises ValueError that names an argument out of range.
    """
    one_of("kind", kind, KINDS)
    typed("latent", latent, Latent)
    whole("card_total", card_total)
    whole("element_bytes", element_bytes, 1, 8)
    side = FALLBACK_PIXELS // STRIDES[kind]
    if version_of(comfyui) < GROWING:
        return Tile(latent.frames, side, side)

    def required(frames: int, across: int) -> int:
        tile = latent._replace(
            frames=min(latent.frames, frames), rows=min(latent.rows, across), columns=min(latent.columns, across)
        )
        return host_decode_required(kind, tile, element_bytes)

    budget = min(host_decode_required(kind, latent, element_bytes), card_total * BUDGET_PERCENT // 100)
    frames = latent.frames
    while frames > 2 and required(frames, side) > budget:
        frames = -(-frames // 2)
    while side * 2 <= max(latent.rows, latent.columns) and required(frames, side * 2) <= budget:
        side *= 2
    return Tile(frames, side, side)


def encode_fallback_tile(kind: VaeKind, latent: Latent) -> Tile:
    """The tile that an encode falls back to: 256 pixels and the whole clip, in every version (comfy/sd.py, VAE.encode)."""
    one_of("kind", kind, KINDS)
    typed("latent", latent, Latent)
    side = FALLBACK_PIXELS // STRIDES[kind]
    return Tile(latent.frames, side, side)


def tiled_decode(
    kind: VaeKind,
    video: Video,
    tile: Tile,
    backend: Backend | None = None,
    *,
    output_on_card: bool = False,
    slow_conv3d: bool = False,
) -> Estimate:
    """Peak allocated of a decode of `video` in tiles, in bytes: that of the largest tile. Clips are done one by one.

    Frames are blended where ComfyUI keeps its results: in system memory, or with `output_on_card` (--gpu-only) on the card
    (comfy/utils.py, tiled_scale_multidim: output, weights of the blend, and both of the tile, in fp32). Raises ValueError that
    names an argument out of range.
    """
    return _tiled("decode", kind, video, tile, checked(backend), output_on_card, slow_conv3d)


def tiled_encode(
    kind: VaeKind,
    video: Video,
    tile: Tile,
    backend: Backend | None = None,
    *,
    output_on_card: bool = False,
    slow_conv3d: bool = False,
) -> Estimate:
    """The same of an encode."""
    return _tiled("encode", kind, video, tile, checked(backend), output_on_card, slow_conv3d)


def _tiled(
    way: str, kind: VaeKind, video: Video, tile: Tile, backend: Backend, output_on_card: bool, slow_conv3d: bool
) -> Estimate:
    one_of("kind", kind, KINDS)
    typed("video", video, Video)
    typed("tile", tile, Tile)
    flag("output_on_card", output_on_card)
    for name, value in (("tile.frames", tile.frames), ("tile.rows", tile.rows), ("tile.columns", tile.columns)):
        whole(name, value, 0, 1 << 21)
    stride = STRIDES[kind]
    latent = video.latent(stride)
    frames = min(latent.frames, tile.frames)
    part = Video(
        min(latent.columns, tile.columns) * stride,
        min(latent.rows, tile.rows) * stride,
        min(video.frames, video_frames(frames)) if way == "encode" else video_frames(frames),
    )
    forward = vae_decode if way == "decode" else vae_encode
    made = forward(kind, part, backend, slow_conv3d=slow_conv3d)
    said = f"In tiles of {part.width} x {part.height} pixels and {part.frames} frames."
    made = replace(made, assumptions=(*made.assumptions, said))
    if output_on_card:
        made = made.plus(4 * _values(way, kind, video, video.batch) + 4 * _values(way, kind, part, 1), "blending of the tiles")
    return made


def _values(way: str, kind: VaeKind, video: Video, batch: int) -> int:
    """Numbers of a result and of the weights of its blend."""
    stride = STRIDES[kind]
    if way == "encode":
        latent = video.latent(stride)
        return batch * latent.frames * latent.rows * latent.columns * (CHANNELS[kind] + 1)
    shape = video.latent(stride)
    return batch * video_frames(latent_frames(video.frames)) * shape.rows * shape.columns * stride**2 * 4
