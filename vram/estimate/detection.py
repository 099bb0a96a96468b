"""A diffusion model that only its host knows: what the host takes a forward of it to need, and an estimate that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .estimate import Estimate, Term

OVERSTATED: Final = 2.25
"""ComfyUI's formula over the traced peak, at most: WAN 14B on ComfyUI 0.8 and 0.33, torch 2.13. No other family was traced."""

UNDERSTATED: Final = 1.3
"""The other side: reserved memory over ComfyUI's formula, at most (WAN 1.3B at 480p, eager RoPE, simulated allocator)."""


@dataclass(frozen=True, slots=True)
class HostDetection:
    """What the host's own detection says of a file."""

    name: str
    """The host's name for the model: `Flux`, `SDXL`, `QwenImage`, ..."""
    bytes_per_cell: float
    """Bytes that the host makes room for, per latent cell of a batch: its formula is proportional to their number."""
    latent_channels: int
    spatial_stride: int
    """Pixels of one latent cell, in each direction."""
    temporal_stride: int | None
    """Frames of one latent frame after the first; None for models of single images."""
    parameters: int


def host_required(detection: HostDetection, *, width: int, height: int, frames: int = 1, batch: int = 1) -> Estimate:
    """What the host makes room for before one forward of `batch` clips of `frames` at `width` x `height` pixels, in bytes.

    Frames of a model of single images are a batch. Raises ValueError that names the size that is below 1.
    """
    for name, value in (("width", width), ("height", height), ("frames", frames), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    latent_frames = (frames - 1) // detection.temporal_stride + 1 if detection.temporal_stride else frames
    stride = detection.spatial_stride
    cells = batch * latent_frames * max(1, height // stride) * max(1, width // stride)
    expected = round(cells * detection.bytes_per_cell)
    return Estimate(
        expected=expected,
        lower=int(expected / OVERSTATED),
        upper=round(expected * UNDERSTATED),
        terms=(Term(f"ComfyUI's own figure for {detection.name}", expected),) if expected else (),
        assumptions=(f"{detection.name} is no WAN model: this is what ComfyUI makes room for, not checked by us",),
    )
