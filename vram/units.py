"""Bytes and GiB: the only place that divides by 2**30."""

from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30


def gib(count: int) -> float:
    """Bytes as GiB (2**30 bytes), for messages and JSON fields that say so."""
    return count / GIB


def say_gib(count: int) -> str:
    """Bytes for a person: `13.3 GB`, below 0.1 GiB in whole MB. 1 GB here is 2**30 bytes, as ComfyUI counts."""
    if count < 0:
        return "-" + say_gib(-count)
    if count < GIB // 10:
        return f"{round(count / MIB)} MB"
    return f"{gib(count):.1f} GB"
