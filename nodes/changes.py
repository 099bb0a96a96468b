"""Whether two reports differ in anything that a person would see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..vram.units import MIB

GRAIN: Final = MIB
"""Bytes of a card's memory that change by less are the same: allocators hand out 2 MiB at a time (CUDACachingAllocator)."""

RAM_GRAIN: Final = 64 * MIB
"""System memory changes all the time by less, and is shown in tenths of a GiB."""

PASSING: Final = frozenset(
    {"taken_at", "age_seconds", "idle_seconds", "waited_seconds", "utilization_percent", "pressure_percent"}
)
"""Fields that follow from the time or from other fields."""


def differs(one: object, other: object, grain: int = GRAIN) -> bool:
    """Ages and times don't count, nor do bytes that changed by less than `grain`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return True
        return any(
            _field_differs(name, value, other[name], RAM_GRAIN if name == "ram" else grain)
            for name, value in one.items()
            if name not in PASSING
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) != len(other) or any(differs(*pair, grain) for pair in zip(one, other, strict=True))
    return one != other


def _field_differs(name: str, one: object, other: object, grain: int) -> bool:
    if "bytes" in name and isinstance(one, int) and isinstance(other, int):
        return abs(one - other) >= grain
    return differs(one, other, grain)
