"""The tiles that are tried when a decode does not fit whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram.decoding import FEWEST_FRAMES, SMALLEST_TILE, TILE_STEP, tilings


def by_area(size: int, frames: int) -> int:
    return size * size * frames


def test_the_first_tile_is_the_largest_that_fits() -> None:
    first = next(tilings(1280, 720, 81, by_area(512, 81) + 5, by_area))
    assert (first.size, first.frames) == (512, 81)
    assert first.overlap == 64


def test_tiles_shrink_across_before_along_time() -> None:
    tried = list(tilings(1280, 720, 81, by_area(512, 81), by_area))
    sizes = [tile.size for tile in tried if tile.frames == 81]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] == SMALLEST_TILE
    assert [tile.frames for tile in tried if tile.frames != 81] == [40, 20, 10, FEWEST_FRAMES]
    assert {tile.size for tile in tried if tile.frames != 81} == {SMALLEST_TILE}


def test_where_nothing_fits_the_smallest_is_tried() -> None:
    tried = list(tilings(832, 480, 5, 0, by_area))
    assert [(tile.size, tile.frames) for tile in tried] == [(SMALLEST_TILE, 5)]


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 400), st.integers(0, 10**10))
def test_a_tile_is_smaller_than_the_video_and_of_whole_steps(width: int, height: int, frames: int, room: int) -> None:
    tried = list(tilings(width, height, frames, room, by_area))
    costs = [by_area(tile.size, tile.frames) for tile in tried]
    assert costs == sorted(costs, reverse=True)
    assert len(set(tried)) == len(tried) < 40
    for tile in tried:
        assert tile.size % TILE_STEP == 0
        assert tile.size == SMALLEST_TILE or tile.size < max(width, height)
        assert tile.overlap * 4 <= tile.size


@pytest.mark.parametrize("size", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_size_of_nothing_is_refused_by_name(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="width, height and frames"):
        next(tilings(*size, 0, by_area))
