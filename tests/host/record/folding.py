"""Tensor lists as short JSON: repeated blocks are written once, with their numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> its type as safetensors calls it, and its shape."""

_NUMBERED = re.compile(r"(?P<before>(?:[^.]+\.)*?)(?P<number>\d+)\.(?P<after>.+)")


def folded(tensors: Tensors) -> dict[str, object]:
    """`tensors` with `name.N.rest` of equal shapes gathered under `name.{first-last}.rest`."""
    alone: dict[str, str] = {}
    blocks: dict[str, dict[int, dict[str, str]]] = {}
    for name, (dtype, shape) in tensors.items():
        described = " ".join((dtype, *(str(size) for size in shape)))
        found = _NUMBERED.fullmatch(name)
        if found is None:
            alone[name] = described
        else:
            blocks.setdefault(found["before"], {}).setdefault(int(found["number"]), {})[found["after"]] = described
    repeated: list[object] = []
    for before, numbered in blocks.items():
        patterns: list[tuple[dict[str, str], list[int]]] = []
        for number, pattern in sorted(numbered.items()):
            same = next((numbers for known, numbers in patterns if known == pattern), None)
            if same is None:
                patterns.append((pattern, [number]))
            else:
                same.append(number)
        repeated.extend({"before": before, "numbers": numbers, "tensors": pattern} for pattern, numbers in patterns)
    return {"tensors": alone, "repeated": repeated}


def unfolded(record: Mapping[str, object]) -> Tensors:
    """What `folded` was given."""
    tensors: Tensors = {}
    alone, repeated = record["tensors"], record["repeated"]
    assert isinstance(alone, dict)
    assert isinstance(repeated, list)
    for name, described in alone.items():
        tensors[name] = _tensor(described)
    for block in repeated:
        for number in block["numbers"]:
            for after, described in block["tensors"].items():
                tensors[f"{block['before']}{number}.{after}"] = _tensor(described)
    return tensors


def _tensor(described: str) -> tuple[str, tuple[int, ...]]:
    dtype, *shape = described.split()
    return dtype, tuple(int(size) for size in shape)
