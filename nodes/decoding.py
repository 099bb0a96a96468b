"""VAE Decode (VRAM): whole whenever that fits after all else has left, in tiles only when it does not, and it says so."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Final

from ..vram.estimate.tokens import Latent
from ..vram.recovery import is_out_of_memory, was_given_up
from ..vram.units import say_gib
from .controls import Control
from .tiles import Tiles

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
        tiles, latent = Tiles(self.pack, vae), self.pack.host.decoder.latent_of(samples)
        room = tiles.room()
        least, most = tiles.whole_needs(latent)
        done = self._whole(vae, samples) if room is None or least <= room else None
        # what could be had when the decode was tried need not be there any more
        room = tiles.room() or 0
        why = f"blended at their edges: whole it needs {say_gib(most)}, and {say_gib(room)} can be had"
        if done is None:
            pixels, size, frames = self._in_tiles(tiles, latent, vae, samples, room)
            return self.said(f"decoded in tiles of {size} px, {frames} frames at a time, {why}", pixels)
        pixels, size = done
        return self.said("decoded whole" if size is None else f"decoded in tiles of {size} px, {why}", pixels)

    def _whole(self, vae: Any, samples: Any) -> tuple[Any, int | None] | None:
        """The frames, and the pixels of the tiles that it had to be; None where memory ran out in those as well."""
        try:
            return self.pack.host.decoder.whole(vae, samples)
        except Exception as error:
            if not is_out_of_memory(error) or was_given_up(error):
                raise
            logger.warning("memory ran out decoding the latent whole: %s", error)
        self.pack.host.decoder.empty_cache()
        return None

    def _in_tiles(self, tiles: Tiles, latent: Latent, vae: Any, samples: Any, room: int) -> tuple[Any, int, int]:
        """The frames, and the pixels and frames of a tile."""
        decoder = self.pack.host.decoder
        last: Exception | None = None
        for tiling in tiles.of_decode(latent, room):
            # at least two latent frames, as ComfyUI's own widget asks for
            frames = max(8, tiling.frames)
            try:
                pixels, used = decoder.tiled(vae, samples, tiling.size, tiling.overlap, frames, tiling.frames_overlap)
                return pixels, used or tiling.size, tiling.frames
            except Exception as error:
                if not is_out_of_memory(error) or was_given_up(error):
                    raise
                # its frames keep the tensors that filled the card
                last = error.with_traceback(None)
            logger.warning("tiles of %d px do not fit, trying smaller ones", tiling.size)
            decoder.empty_cache()
        assert last is not None
        raise last


NODE_CLASSES: Final[dict[str, Any]] = {VAE_DECODE: VAEDecode}
NODE_NAMES: Final = {VAE_DECODE: "VAE Decode (VRAM Headroom)"}
