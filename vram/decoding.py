"""How a latent is best decoded in the memory there is: whole if that can be, else in the largest tiles that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

SMALLEST_TILE: Final = 64
"""Pixels: the least that VAEDecodeTiled takes (ComfyUI nodes.py, 0.8 and 0.33)."""

TILE_STEP: Final = 32
"""Pixels: the step of that widget; whole cells of both of WAN's VAEs."""

FEWEST_FRAMES: Final = 8
"""Of one tile: the least that widget takes."""

LARGEST_OVERLAP: Final = 64
"""Pixels: that widget's default."""


class Tiling(NamedTuple):
    """Tiles of a decode: pixels, and frames of the video."""

    size: int
    overlap: int
    frames: int
    frames_overlap: int = 8


Peak = Callable[[int, int], int]
"""Bytes that a tile of so many pixels across and so many frames takes."""


def tilings(width: int, height: int, frames: int, room: int, peak: Peak) -> Iterator[Tiling]:
    """Tiles to try one after the other when memory runs out: first the largest that fits into `room` bytes by `peak`, then ever
    smaller ones, and only then fewer frames at a time, since a cut in time is seen first.

    The largest is smaller than the video: else it would be no tile. Raises ValueError for a size below 1.
    """
    if min(width, height, frames) < 1:
        raise ValueError(f"width, height and frames must be at least 1, not {width}, {height} and {frames}")
    largest = max(SMALLEST_TILE, (max(width, height) - 1) // TILE_STEP * TILE_STEP)
    sides = range(largest, SMALLEST_TILE - 1, -TILE_STEP)
    side = next((side for side in sides if peak(side, frames) <= room), SMALLEST_TILE)
    yield _tiling(side, frames)
    while side > SMALLEST_TILE:
        side = max(SMALLEST_TILE, side * 3 // 4 // TILE_STEP * TILE_STEP)
        yield _tiling(side, frames)
    while frames > FEWEST_FRAMES:
        frames = max(FEWEST_FRAMES, frames // 2)
        yield _tiling(side, frames)


def _tiling(size: int, frames: int) -> Tiling:
    return Tiling(size, min(LARGEST_OVERLAP, size // 4), frames)
