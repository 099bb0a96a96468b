"""Checkpoints made of nothing but a header: from recorded tensor lists, from a module on the meta device, or by hand."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from host.record.folding import Tensors, unfolded
from vram_headroom.vram.estimate.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo

DATA = Path(__file__).parent / "data"


def checkpoint(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """A file of `tensors`, by their types and shapes."""
    infos = {
        name: TensorInfo(name, dtype, shape, prod(shape) * DTYPE_BITS[dtype] // 8) for name, (dtype, shape) in tensors.items()
    }
    total = sum(info.nbytes for info in infos.values())
    return Checkpoint("/models/some.safetensors", total + 8, MappingProxyType(infos), MappingProxyType(dict(metadata or {})))


def recorded_checkpoint(record: Mapping[str, Any]) -> Checkpoint:
    """The file that one entry of variants.json or footprints.json describes."""
    return checkpoint(unfolded(record), record["metadata"])


def recorded(name: str) -> dict[str, Any]:
    """The recorded readings in tests/data/`name`.json."""
    return json.loads((DATA / f"{name}.json").read_text())


def of_shapes(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str = "F16") -> Checkpoint:
    """A file of tensors of one type."""
    return checkpoint({name: (dtype, shape) for name, shape in shapes})
