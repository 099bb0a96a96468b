"""Decoding in tiles as a knob: ComfyUI's own tiled decode and WanVideoWrapper's, the largest tiles first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .bench import Bench, Knob, Turn
from .patch import Change, ReplaceNode, Widget
from .types import PhasePlan

WHOLE: Final = "VAEDecode"
TILED: Final = "VAEDecodeTiled"
WRAPPER: Final = "WanVideoDecode"
"""WanVideoWrapper's (nodes.py): a switch turns its tiles on."""

TILE_STEP: Final = 32
"""VAEDecodeTiled: tile_size in steps of 32 (ComfyUI nodes.py, 0.8 and 0.33); the wrapper's is in steps of 1 or 8."""

LEAST_TILE: Final = 64
"""Both: tile_size at least 64 (ComfyUI nodes.py; 64 or 40 in WanVideoWrapper's nodes.py)."""

LARGEST_TILE: Final = 2048
"""The wrapper's largest, half of ComfyUI's."""

TILE_OVERLAP: Final = 64
"""VAEDecodeTiled's default overlap; more than a quarter of the tile is cut to that (ComfyUI nodes.py)."""

TEMPORAL_LIMITS: Final = (8, 4096)
"""VAEDecodeTiled: limits of temporal_size, in steps of 4 (ComfyUI nodes.py). It covers the clip here: WAN's VAE decodes one
latent frame at a time anyway (comfy/ldm/wan/vae.py), so a cut in time would save next to nothing."""

SWITCH: Final = "enable_vae_tiling"


def tiled_decode(bench: Bench) -> list[Knob]:
    """Where a decode does not fit: whole ones in tiles, and smaller tiles where there are some already."""
    return _knob(bench, [planned for planned in bench.pressing if planned.phase.kind == "vae_decode"], "")


def tiled_at_once(bench: Bench) -> list[Knob]:
    """For decodes that ComfyUI tries in tiles after they ran out of memory whole: tiles from the start, and larger ones."""
    failing = [planned for planned in bench.plan.phases if planned.phase.kind == "vae_decode" and planned.tiled is not None]
    return _knob(bench, failing, "no first attempt that runs out of memory")


def _knob(bench: Bench, pressing: Iterable[PhasePlan], gain: str) -> list[Knob]:
    graph = bench.graph
    decodes = {
        planned.phase.node_id: planned
        for planned in pressing
        if graph.class_of(planned.phase.node_id) in (WHOLE, TILED, WRAPPER)
        and (graph.class_of(planned.phase.node_id) == WRAPPER or TILED in bench.vocabulary)
    }
    now = {node_id: _side(bench, node_id, planned) for node_id, planned in decodes.items()}
    largest = min(LARGEST_TILE, (max(now.values(), default=0) - 1) // TILE_STEP * TILE_STEP)
    sizes = range(largest, LEAST_TILE - 1, -TILE_STEP)

    def turn(level: int) -> Turn | None:
        changes: list[Change] = []
        counts: list[tuple[int, int]] = []
        for node_id, planned in decodes.items():
            tile = min(sizes[level], max(LEAST_TILE, now[node_id]))
            found = _with_tile(bench, node_id, planned, tile)
            if found is None:
                return None
            changes.extend(found)
            overlap = tile // 2 if graph.class_of(node_id) == WRAPPER else _overlap(tile)
            here = planned.tiled or planned.phase.tile
            counts.append((_tiles(planned, tile, overlap), _tiles(planned, here.size, here.overlap) if here else 1))
        most, before = max(counts)
        passes = f"{most} tiles instead of {before if before > 1 else 'one pass'}" if most else ""
        said = "; ".join(part for part in (gain, passes) if part)
        return Turn(f"Decode the video in tiles of {sizes[level]} px", tuple(changes), said)

    return [Knob("tiled_decode", "tiled", len(sizes), turn)] if sizes else []


def _side(bench: Bench, node_id: str, planned: PhasePlan) -> int:
    """What is decoded at once now, in pixels: the tile of a node that tiles, else the video's longer side."""
    phase = planned.phase
    if phase.tile is not None:
        return phase.tile.size
    if bench.graph.class_of(node_id) == TILED:
        return LEAST_TILE
    return max(phase.width or 0, phase.height or 0)


def _with_tile(bench: Bench, node_id: str, planned: PhasePlan, tile: int) -> tuple[Change, ...] | None:
    """Changes that make a node decode in tiles of this size; None where a widget of it can't be set."""
    graph = bench.graph
    if graph.class_of(node_id) == WRAPPER:
        wanted: dict[Widget, object] = {Widget(node_id, side): tile for side in ("tile_x", "tile_y")}
        # half of a tile lies on the next, as its defaults of 272 and 144 have it; the tile must be larger than the stride
        wanted |= {Widget(node_id, stride): tile // 2 for stride in ("tile_stride_x", "tile_stride_y")}
        if graph.value(node_id, SWITCH) is not True:
            wanted[Widget(node_id, SWITCH)] = True
        return bench.widgets.settings(wanted)
    if graph.class_of(node_id) == TILED:
        wanted = {Widget(node_id, "tile_size"): tile}
        if (bench.whole(node_id, "overlap") or 0) * 4 > tile:
            wanted[Widget(node_id, "overlap")] = _overlap(tile)
        return bench.widgets.settings(wanted)
    low, high = TEMPORAL_LIMITS
    frames = planned.phase.frames
    temporal = high if frames is None else min(high, max(low, (frames + 3) // 4 * 4))
    kept = {name: value for name, value in graph.inputs(node_id).items() if name in ("samples", "vae")}
    widgets = {"tile_size": tile, "overlap": _overlap(tile), "temporal_size": temporal, "temporal_overlap": low}
    return (ReplaceNode(node_id, TILED, {**kept, **widgets}),)


def _overlap(tile: int) -> int:
    return TILE_OVERLAP if tile >= 4 * TILE_OVERLAP else TILE_OVERLAP // 2


def _tiles(planned: PhasePlan, tile: int, overlap: int) -> int:
    """How many there are; 0 where the size of the video is not known."""
    width, height = planned.phase.width, planned.phase.height
    return _along(width, tile, overlap) * _along(height, tile, overlap) if width and height else 0


def _along(side: int, tile: int, overlap: int) -> int:
    """Tiles start every tile - overlap pixels until one reaches the edge (ComfyUI comfy/utils.py tiled_scale_multidim)."""
    overlap = min(overlap, tile // 2)
    return 1 if side <= tile else -(-(side - overlap) // (tile - overlap))
