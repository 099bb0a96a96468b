"""How much of a video a VAE can take at once in the memory that can be had, by the pack's estimates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..vram.decoding import Tiling, tilings
from ..vram.device import DeviceReadError
from ..vram.estimate.backend import Backend
from ..vram.estimate.tiling import Tile, tiled_decode, tiled_encode
from ..vram.estimate.tokens import Latent, Video, video_frames
from ..vram.estimate.vae import vae_decode
from ..vram.monitor import NoAcceleratorError
from .host.decoding import VaeInfo
from .pack import Pack


class Tiles:
    """Answers for one VAE object of ComfyUI."""

    def __init__(self, pack: Pack, vae: Any) -> None:
        self._pack = pack
        self._vae = vae
        self.info: VaeInfo = pack.host.decoder.look_at(vae)

    def room(self) -> int | None:
        """Bytes that can be had beside the VAE's weights once everything else has left; None where no card tells."""
        try:
            snapshot = self._pack.monitor.snapshot()
        except (NoAcceleratorError, DeviceReadError):
            return None
        held = self._pack.host.models.find(id(self._vae.patcher.model))
        stays = held is not None and held.key in self._pack.offloader.pinned_keys()
        # what is pinned does not count as reclaimable, so its bytes are missing from there already
        there = held.bytes_on_card if held is not None and stays else 0
        return max(0, snapshot.reclaimable_free - max(0, self.info.weight_bytes - there))

    def whole_needs(self, latent: Latent) -> tuple[int, int]:
        """The least and the most that a whole decode takes beside weights, in bytes."""
        if self.info.kind is None:
            own = self._pack.host.decoder.own_figure(self._vae, _shape(self._vae, latent))
            return own, own
        estimate = vae_decode(self.info.kind, self._video(latent), self._backend())
        return estimate.lower, estimate.expected

    def of_decode(self, latent: Latent, room: int) -> Iterator[Tiling]:
        """Tiles for a latent, the largest that fit into `room` bytes first."""
        video = self._video(latent)

        def peak(size: int, frames: int) -> int:
            cells = max(1, size // self.info.stride)
            tile = Tile(max(1, -(-frames // self.info.frames_stride)), cells, cells)
            if self.info.kind is None:
                rows, columns = min(latent.rows, cells), min(latent.columns, cells)
                part = Latent(1, min(latent.frames, tile.frames), rows, columns)
                return self._pack.host.decoder.own_figure(self._vae, _shape(self._vae, part))
            return tiled_decode(self.info.kind, video, tile, self._backend()).upper

        return tilings(video.width, video.height, video.frames, room, peak)

    def of_encode(self, video: Video, room: int) -> Iterator[Tiling]:
        """Tiles for a video of whole latent cells, the largest that fit into `room` bytes first."""

        def peak(size: int, frames: int) -> int:
            if self.info.kind is None:
                shape = (1, 3, frames, min(video.height, size), min(video.width, size))
                return self._pack.host.decoder.own_encode_figure(self._vae, shape)
            cells = max(1, size // self.info.stride)
            tile = Tile(max(1, -(-frames // self.info.frames_stride)), cells, cells)
            return tiled_encode(self.info.kind, video, tile, self._backend()).upper

        return tilings(video.width, video.height, video.frames, room, peak)

    def _video(self, latent: Latent) -> Video:
        frames = video_frames(latent.frames) if self.info.frames_stride > 1 else latent.frames
        return Video(latent.columns * self.info.stride, latent.rows * self.info.stride, frames, latent.batch)

    def _backend(self) -> Backend:
        return replace(self._pack.host.models.rules().backend, vae_element_bytes=self.info.element_bytes)


def _shape(vae: Any, latent: Latent) -> tuple[int, ...]:
    channels = int(getattr(vae, "latent_channels", 16))
    if getattr(vae, "latent_dim", 2) == 3:
        return (latent.batch, channels, latent.frames, latent.rows, latent.columns)
    return (latent.batch, channels, latent.rows, latent.columns)
