"""ComfyUI's VAE objects: what one is, decoding with it, whole or in tiles, and what is done where memory runs out in it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import comfy.model_management as model_management
import nodes as comfy_nodes

from ...vram.decoding import Tiling
from ...vram.estimate.tokens import Latent, Video
from ...vram.recovery import OutOfMemoryError
from .seams import TILED_DECODE, TILED_ENCODE, VAE_CALLS, SeamTable

VaeKind = Literal["2.1", "2.2"]


class VaeInfo(NamedTuple):
    """A VAE object, as far as its memory depends on it."""

    kind: VaeKind | None
    """Which of WAN's it is; None: another one."""
    stride: int
    """Pixels of one latent cell."""
    frames_stride: int
    """Frames of one latent frame; 1 for pictures."""
    element_bytes: int
    weight_bytes: int


class VaeCall(NamedTuple):
    """One decode or encode of a video that a node asked for."""

    way: Literal["decode", "encode"]
    vae: Any
    given: Any
    """The latent of a decode, the pixels of an encode; nothing writes to it."""
    first: Callable[[], Any]
    """As it was asked for. Raises torch.OutOfMemoryError where ComfyUI would turn to tiles of its own."""
    whole: bool
    """It was asked for without tiles."""
    in_tiles: Callable[[Tiling], Any]
    latent: Latent | None
    """Of a decode."""
    video: Video | None
    """Of an encode; both None where its shape is no video's."""


class VaeRescuer(Protocol):
    def vae(self, call: VaeCall) -> Any:
        """What the VAE answers, in tiles where it must be."""
        ...


class HostDecoder:
    """Decodes through ComfyUI's own nodes, notices when ComfyUI itself turns to tiles, and hands what a VAE is asked for to a
    rescuer."""

    def __init__(self, seams: SeamTable) -> None:
        self._here = threading.local()
        self._rescuer: VaeRescuer | None = None
        vae = getattr(importlib.import_module("comfy.sd"), "VAE", None)
        seams.wrap(TILED_DECODE, vae, "decode_tiled_3d", self._around_tiled)
        seams.wrap(TILED_ENCODE, vae, "encode_tiled_3d", self._around_tiled_encode)
        calls = (
            (vae, "decode", self._around_decode),
            (vae, "decode_tiled", self._around_decode_tiled),
            (vae, "encode", self._around_encode),
            (vae, "encode_tiled", self._around_encode_tiled),
        )
        seams.wrap_all(VAE_CALLS, calls)
        # without these ComfyUI's own fallback can't be told from a call of the rescuer's
        self._rescues = seams.live(TILED_DECODE) and seams.live(TILED_ENCODE) and seams.live(VAE_CALLS)

    def rescue_with(self, rescuer: VaeRescuer) -> None:
        self._rescuer = rescuer if self._rescues else None

    def look_at(self, vae: Any) -> VaeInfo:
        stride = vae.spacial_compression_decode()
        frames_stride = vae.temporal_compression_decode()
        name = type(vae.first_stage_model).__name__
        kind: VaeKind | None = {8: "2.1", 16: "2.2"}.get(stride) if name.startswith("WanVAE") else None  # type: ignore[assignment]
        return VaeInfo(kind, int(stride), int(frames_stride or 1), vae.vae_dtype.itemsize, int(vae.patcher.model_size()))

    def latent_of(self, samples: Any) -> Latent:
        """Cells of a LATENT; a picture's has one frame."""
        shape = tuple(samples["samples"].shape)
        return Latent(shape[0], shape[2] if len(shape) == 5 else 1, shape[-2], shape[-1])

    def own_figure(self, vae: Any, shape: tuple[int, ...]) -> int:
        """Bytes that ComfyUI itself makes room for before it decodes a latent of this shape."""
        return int(vae.memory_used_decode(shape, vae.vae_dtype))

    def own_encode_figure(self, vae: Any, shape: tuple[int, ...]) -> int:
        """The same for an encode of pixels of this shape."""
        return int(vae.memory_used_encode(shape, vae.vae_dtype))

    def whole(self, vae: Any, samples: Any) -> tuple[Any, int | None]:
        """Pixels, and the side in pixels of the tiles that were turned to when memory ran out; None: it was done whole."""
        self._here.tile = None
        node = comfy_nodes.NODE_CLASS_MAPPINGS["VAEDecode"]
        pixels = getattr(node(), node.FUNCTION)(vae=vae, samples=samples)[0]
        return pixels, self._side(vae)

    def tiled(
        self, vae: Any, samples: Any, tile: int, overlap: int, frames: int, frames_overlap: int
    ) -> tuple[Any, int | None]:
        """Pixels, decoded in tiles of `tile` pixels and `frames` frames, and the side of the tiles that it was at last."""
        self._here.tile = None
        node = comfy_nodes.NODE_CLASS_MAPPINGS["VAEDecodeTiled"]
        pixels = getattr(node(), node.FUNCTION)(
            vae=vae,
            samples=samples,
            tile_size=tile,
            overlap=overlap,
            temporal_size=frames,
            temporal_overlap=frames_overlap,
        )[0]
        return pixels, self._side(vae)

    def empty_cache(self) -> None:
        model_management.soft_empty_cache()

    def _side(self, vae: Any) -> int | None:
        cells = getattr(self._here, "tile", None)
        return None if cells is None else int(cells * vae.spacial_compression_decode())

    # what the VAE is asked for

    def _around_decode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._rescued("decode", True, original, args, kwargs)

    def _around_decode_tiled(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._rescued("decode", False, original, args, kwargs)

    def _around_encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._rescued("encode", True, original, args, kwargs)

    def _around_encode_tiled(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._rescued("encode", False, original, args, kwargs)

    def _rescued(
        self, way: Literal["decode", "encode"], whole: bool, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """decode(self, samples_in, ...), encode(self, pixel_samples) and their tiled ways, called by a node."""
        given = args[1] if len(args) > 1 else None
        vae: Any = args[0] if args else None
        if self._rescuer is None or given is None or getattr(self._here, "busy", False) or getattr(vae, "latent_dim", 0) != 3:
            return original(*args, **kwargs)

        def first() -> Any:
            self._here.whole = whole
            try:
                return original(*args, **kwargs)
            finally:
                self._here.whole = False

        def in_tiles(tiling: Tiling) -> Any:
            if way == "decode":
                return vae.decode_tiled(given, **_decode_tiles(vae, tiling))
            return vae.encode_tiled(given, **_encode_tiles(tiling))

        latent = self.latent_of({"samples": given}) if way == "decode" and given.ndim == 5 else None
        video = _video_of(vae, given) if way == "encode" and given.ndim == 4 else None
        self._here.busy = True
        try:
            return self._rescuer.vae(VaeCall(way, vae, given, first, whole, in_tiles, latent, video))
        finally:
            self._here.busy = False

    def _around_tiled(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stop_fallback()
        # decode_tiled_3d(self, samples, tile_t, tile_x, tile_y, ...), in cells of the latent
        self._here.tile = kwargs.get("tile_x", args[3] if len(args) > 3 else 32)
        return original(*args, **kwargs)

    def _around_tiled_encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stop_fallback()
        return original(*args, **kwargs)

    def _stop_fallback(self) -> None:
        """ComfyUI comes here by itself when memory has run out in the whole: others can leave before it must be tiles."""
        if getattr(self._here, "whole", False):
            raise OutOfMemoryError("memory ran out in the VAE, which ComfyUI would now use in tiles")


def _decode_tiles(vae: Any, tiling: Tiling) -> dict[str, int]:
    """As VAEDecodeTiled turns its widgets into cells (nodes.py, 0.8 and 0.33)."""
    stride, frames = vae.spacial_compression_decode(), vae.temporal_compression_decode()
    overlap = min(tiling.overlap, tiling.size // 4)
    sizes = {"tile_x": tiling.size // stride, "tile_y": tiling.size // stride, "overlap": overlap // stride}
    if frames is None:
        return sizes
    cells = max(2, tiling.frames // frames)
    return {**sizes, "tile_t": cells, "overlap_t": max(1, min(cells // 2, tiling.frames_overlap // frames))}


def _encode_tiles(tiling: Tiling) -> dict[str, int]:
    """As VAEEncodeTiled hands its widgets on: in pixels."""
    return {
        "tile_x": tiling.size,
        "tile_y": tiling.size,
        "overlap": tiling.overlap,
        "tile_t": max(8, tiling.frames),
        "overlap_t": tiling.frames_overlap,
    }


def _video_of(vae: Any, pixels: Any) -> Video | None:
    """Of (frames, height, width, channels): what is left of it in whole cells."""
    stride = int(vae.spacial_compression_encode())
    width, height = pixels.shape[2] // stride * stride, pixels.shape[1] // stride * stride
    frames = (pixels.shape[0] - 1) // 4 * 4 + 1
    return Video(width, height, frames) if min(width, height, frames) > 0 else None
