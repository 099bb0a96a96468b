"""ComfyUI's VAE objects: what one is, and decoding with it, whole or in tiles."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import comfy.model_management as model_management
import nodes as comfy_nodes

from ...vram.estimate.tokens import Latent
from .seams import TILED_DECODE, SeamTable

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


class HostDecoder:
    """Decodes through ComfyUI's own nodes, and notices when ComfyUI itself turns to tiles."""

    def __init__(self, seams: SeamTable) -> None:
        self._fell_back = threading.local()
        vae = getattr(importlib.import_module("comfy.sd"), "VAE", None)
        seams.wrap(TILED_DECODE, vae, "decode_tiled_3d", self._around_tiled)

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

    def whole(self, vae: Any, samples: Any) -> tuple[Any, int | None]:
        """Pixels, and the side in pixels of the tiles ComfyUI turned to when memory ran out; None: it was done whole."""
        self._fell_back.tile = None
        node = comfy_nodes.NODE_CLASS_MAPPINGS["VAEDecode"]
        pixels = getattr(node(), node.FUNCTION)(vae=vae, samples=samples)[0]
        cells = self._fell_back.tile
        return pixels, None if cells is None else int(cells * vae.spacial_compression_decode())

    def tiled(self, vae: Any, samples: Any, tile: int, overlap: int, frames: int, frames_overlap: int) -> Any:
        """Pixels, decoded in tiles of `tile` pixels and `frames` frames."""
        node = comfy_nodes.NODE_CLASS_MAPPINGS["VAEDecodeTiled"]
        return getattr(node(), node.FUNCTION)(
            vae=vae,
            samples=samples,
            tile_size=tile,
            overlap=overlap,
            temporal_size=frames,
            temporal_overlap=frames_overlap,
        )[0]

    def empty_cache(self) -> None:
        model_management.soft_empty_cache()

    def _around_tiled(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # decode_tiled_3d(self, samples, tile_t, tile_x, tile_y, ...), in cells of the latent
        self._fell_back.tile = kwargs.get("tile_x", args[3] if len(args) > 3 else 32)
        return original(*args, **kwargs)
