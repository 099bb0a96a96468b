"""The recorded forwards of tests/data as values: rows by name, and the shape of each model they are about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vram_headroom.vram.estimate.backend import Backend
from vram_headroom.vram.estimate.dit_shape import DitShape

DATA = Path(__file__).parent / "data"
VERSIONS = {"0.33": (0, 33, 0), "0.8": (0, 8, 0)}


_SMALL = DitShape(1536, 8960, 12, 30, 16, 16)
_LARGE = DitShape(5120, 13824, 40, 40, 16, 16)


SHAPES: dict[str, DitShape] = {
    "t2v-1.3b": _SMALL,
    "t2v-14b": _LARGE,
    "i2v-14b": replace(_LARGE, in_channels=36, variant="i2v", image_tokens=257),
    "flf2v-14b": replace(_LARGE, in_channels=36, variant="flf2v", image_tokens=514),
    "i2v-a14b": replace(_LARGE, in_channels=36, variant="i2v_2.2"),
    "ti2v-5b": DitShape(3072, 14336, 24, 30, 48, 48, "ti2v"),
    "fun-control-14b": replace(_LARGE, in_channels=48, variant="fun_control", image_tokens=257),
    "fun-control-a14b": replace(_LARGE, in_channels=52, variant="fun_control_2.2", reference_frames=1),
    "vace-1.3b": replace(_SMALL, variant="vace", vace_layers=15),
    "vace-14b": replace(_LARGE, in_channels=16, variant="vace", vace_layers=8),
    "camera-14b": replace(_LARGE, in_channels=32, variant="camera", image_tokens=257),
    "camera-a14b": replace(_LARGE, in_channels=36, variant="camera_2.2"),
    "s2v-14b": replace(_LARGE, in_channels=16, variant="s2v", reference_frames=1),
    "s2v-14b-motion": replace(_LARGE, in_channels=16, variant="s2v", reference_frames=1, motion=True),
    "humo-17b": replace(_LARGE, in_channels=36, variant="humo", reference_frames=1),
    "animate-14b": replace(_LARGE, in_channels=36, variant="animate", image_tokens=257, leading_frames=1),
    "scail-14b": replace(_LARGE, in_channels=20, variant="scail", image_tokens=257, reference_frames=1),
    "causal-1.3b": replace(_SMALL, variant="causal"),
}
"""By the variant's name in the traces (tests/host/record/wan_forwards.py)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded forward."""

    version: str
    component: str
    variant: str
    weights: str
    fused_rope: bool | None
    fused_rms_norm: bool | None
    workspace: str | None
    batch: int
    frames: int
    height: int
    width: int
    latent: tuple[int, ...] | None
    tokens: int | None
    peak_bytes: int
    reserved_bytes: int
    output_bytes: int
    kept_bytes: int

    @property
    def name(self) -> str:
        kernels = f"rope {self.fused_rope}, norm {self.fused_rms_norm}, workspace {self.workspace}"
        size = f"{self.batch} x {self.frames} x {self.height} x {self.width}"
        return f"{self.version} {self.component} {self.variant} {self.weights} {kernels}, {size}"

    @property
    def backend(self) -> Backend:
        return Backend(
            VERSIONS[self.version],
            self.fused_rope,
            self.fused_rms_norm,
            allocator="native",
            vae_element_bytes=4 if self.weights == "fp32" else 2,
        )


@cache
def rows() -> tuple[Row, ...]:
    """All of both versions."""
    return tuple(_read())


def _read() -> Iterator[Row]:
    for version in VERSIONS:
        stored = json.loads((DATA / f"traces-{version}.json").read_text(encoding="utf-8"))
        for row in stored["rows"]:
            given: dict[str, Any] = dict(zip(stored["columns"], row, strict=True))
            given |= {name: given[name] or 0 for name in ("frames", "height", "width")}
            given["latent"] = tuple(given["latent"]) if given["latent"] else None
            yield Row(version, **given)


def of(*components: str) -> list[Row]:
    """Those of these components."""
    return [row for row in rows() if row.component in components]
