"""VAE Decode (VRAM): whole whenever that fits after all else has left, in tiles only when it does not, and it says so."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar, Final

from ..vram.decoding import Tiling, tilings
from ..vram.device import DeviceReadError
from ..vram.estimate.backend import Backend
from ..vram.estimate.tiling import Tile, tiled_decode
from ..vram.estimate.tokens import Latent, Video, video_frames
from ..vram.estimate.vae import vae_decode
from ..vram.monitor import NoAcceleratorError
from ..vram.recovery import is_out_of_memory
from ..vram.units import say_gib
from .controls import Control
from .host.decoding import VaeInfo

logger = logging.getLogger("vram_headroom")

VAE_DECODE: Final = "VRAMHeadroomVAEDecode"


class VAEDecode(Control):
    """Decodes a latent without spoiling it with tiles that were not needed."""

    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The frames.",)
    DESCRIPTION = (
        "Decodes a latent whole whenever that fits after every other model has left the card, and only otherwise in tiles: the "
        "largest that fit, and smaller ones if memory still runs out. The node shows which it was."
    )
    SEARCH_ALIASES: ClassVar = ["vae decode", "tiled decode", "latent to image", "out of memory", "vram"]
    CATEGORY = "VRAM Headroom/latent"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latent to decode."}),
                "vae": ("VAE", {"tooltip": "The VAE it was made for."}),
            }
        }

    def run(self, samples: Any, vae: Any) -> dict[str, Any]:
        """The frames. Raises torch.OutOfMemoryError when not even the smallest tiles fit; the latent is untouched."""
        decoder = self.pack.host.decoder
        info, latent = decoder.look_at(vae), decoder.latent_of(samples)
        room = self._room(info, vae)
        least, most = self._whole_needs(info, latent, vae)
        done = self._whole(vae, samples) if room is None or least <= room else None
        if done is None:
            # what could be had when the decode was tried need not be there any more
            room = self._room(info, vae) or 0
            pixels, tiling = self._in_tiles(info, latent, vae, samples, room)
            said = (
                f"decoded in tiles of {tiling.size} px, {tiling.frames} frames at a time, blended at their edges: "
                f"whole it needs {say_gib(most)}, and {say_gib(room)} can be had"
            )
            return self.said(said, pixels)
        pixels, said = done
        return self.said(said, pixels)

    def _whole(self, vae: Any, samples: Any) -> tuple[Any, str] | None:
        """The frames and what was done; None where memory ran out, in the tiles as well that ComfyUI then turns to."""
        try:
            pixels, fallback = self.pack.host.decoder.whole(vae, samples)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("memory ran out decoding the latent whole: %s", error)
        else:
            if fallback is None:
                return pixels, "decoded whole"
            return pixels, (
                f"memory ran out decoding it whole: decoded in tiles of {fallback} px, which are blended at their edges"
            )
        self.pack.host.decoder.empty_cache()
        return None

    def _room(self, info: VaeInfo, vae: Any) -> int | None:
        """Bytes that can be had beside the VAE's weights once everything else has left; None where no card tells."""
        try:
            snapshot = self.pack.monitor.snapshot()
        except (NoAcceleratorError, DeviceReadError):
            return None
        held = self.pack.host.models.find(id(vae.patcher.model))
        stays = held is not None and held.key in self.pack.offloader.pinned_keys()
        # what is pinned does not count as reclaimable, so its bytes are missing from there already
        there = held.bytes_on_card if held is not None and stays else 0
        return max(0, snapshot.reclaimable_free - max(0, info.weight_bytes - there))

    def _whole_needs(self, info: VaeInfo, latent: Latent, vae: Any) -> tuple[int, int]:
        """The least and the most that a whole decode takes beside weights, in bytes."""
        if info.kind is None:
            own = self.pack.host.decoder.own_figure(vae, _shape(vae, latent))
            return own, own
        estimate = vae_decode(info.kind, _video(info, latent), self._backend(info))
        return estimate.lower, estimate.expected

    def _tile_needs(self, info: VaeInfo, latent: Latent, vae: Any, size: int, frames: int) -> int:
        cells = max(1, size // info.stride)
        tile = Tile(max(1, -(-frames // info.frames_stride)), cells, cells)
        if info.kind is None:
            rows, columns = min(latent.rows, cells), min(latent.columns, cells)
            part = Latent(1, min(latent.frames, tile.frames), rows, columns)
            return self.pack.host.decoder.own_figure(vae, _shape(vae, part))
        return tiled_decode(info.kind, _video(info, latent), tile, self._backend(info)).upper

    def _in_tiles(self, info: VaeInfo, latent: Latent, vae: Any, samples: Any, room: int) -> tuple[Any, Tiling]:
        video = _video(info, latent)
        last: Exception | None = None
        for tiling in tilings(
            video.width,
            video.height,
            video.frames,
            room,
            lambda size, frames: self._tile_needs(info, latent, vae, size, frames),
        ):
            try:
                decoder = self.pack.host.decoder
                # at least two latent frames, as ComfyUI's own widget asks for
                frames = max(8, tiling.frames)
                return decoder.tiled(vae, samples, tiling.size, tiling.overlap, frames, tiling.frames_overlap), tiling
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # its frames keep the tensors that filled the card
                last = error.with_traceback(None)
            logger.warning("tiles of %d px do not fit, trying smaller ones", tiling.size)
            self.pack.host.decoder.empty_cache()
        assert last is not None
        raise last

    def _backend(self, info: VaeInfo) -> Backend:
        return replace(self.pack.host.models.rules().backend, vae_element_bytes=info.element_bytes)


def _video(info: VaeInfo, latent: Latent) -> Video:
    frames = video_frames(latent.frames) if info.frames_stride > 1 else latent.frames
    return Video(latent.columns * info.stride, latent.rows * info.stride, frames, latent.batch)


def _shape(vae: Any, latent: Latent) -> tuple[int, ...]:
    channels = int(getattr(vae, "latent_channels", 16))
    if getattr(vae, "latent_dim", 2) == 3:
        return (latent.batch, channels, latent.frames, latent.rows, latent.columns)
    return (latent.batch, channels, latent.rows, latent.columns)


NODE_CLASSES: Final[dict[str, Any]] = {VAE_DECODE: VAEDecode}
NODE_NAMES: Final = {VAE_DECODE: "VAE Decode (VRAM Headroom)"}
