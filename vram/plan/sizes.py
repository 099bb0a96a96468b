"""Sizes of pictures, videos and latents before anything has run: exact, at most so much, or not known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class AtMost:
    """A whole number that depends on an input file, with what is known of it: it is not above `value`."""

    value: int
    note: str
    """Why, as a sentence for the plan's assumptions."""


Dim = int | AtMost | None
"""A side in pixels or a count of frames; None: not known before the graph runs."""


class Size(NamedTuple):
    """A batch of pictures, a mask, or the video a latent stands for."""

    width: Dim = None
    height: Dim = None
    frames: Dim = None
    """Pictures in the batch; of a latent, the frames that it decodes to."""
    batch: Dim = 1
    """Videos side by side; a batch of pictures is one video."""


UNKNOWN_SIZE = Size()


def plain(dim: Dim) -> int | None:
    """The number itself, exact or its upper bound."""
    return dim.value if isinstance(dim, AtMost) else dim


def combine(function: Callable[..., float], *dims: Dim) -> Dim:
    """`function` of several dims, as a whole number of at least 0: unknown if one is, at most so much if one is that."""
    values = [plain(dim) for dim in dims]
    if any(value is None for value in values):
        return None
    result = max(0, int(function(*values)))
    note = next((dim.note for dim in dims if isinstance(dim, AtMost)), None)
    return result if note is None else AtMost(result, note)


def at_most(limit: Dim, dim: Dim, note: str) -> Dim:
    """The smaller of both; a `dim` that is not known leaves the limit as the bound, for the reason `note`."""
    known = plain(limit)
    if dim is None:
        return None if known is None else AtMost(known, note)
    return combine(min, limit, dim) if known is not None else dim


def latent_steps(frames: Dim) -> Dim:
    """Latent frames of a clip: WAN's VAE packs four after the first (ComfyUI comfy_extras/nodes_wan.py)."""
    return combine(lambda count: (max(1, count) - 1) // 4 + 1, frames)


def more_latent_frames(frames: Dim, extra: int) -> Dim:
    """Frames of a clip with `extra` latent frames more (or less): each stands for four."""
    return combine(lambda count: max(1, (max(1, count) - 1) // 4 * 4 + 1 + 4 * extra), frames)
