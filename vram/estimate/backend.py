"""The code that will run a forward, as far as its memory depends on it: values that the host's side fills in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Attention = Literal["flash", "sage", "split", "unknown"]
"""`flash`: memory grows with the tokens only (PyTorch SDPA flash or efficient, xformers, flash-attn). `sage`: also int8 copies
of q and k. `split`: ComfyUI's sub-quadratic or split attention, which sizes its pieces by what is free."""

Allocator = Literal["native", "cudaMallocAsync", "unknown"]

NEWEST_TRACED: Final[tuple[int, int, int]] = (0, 33, 0)
"""The newest ComfyUI whose WAN classes were traced for the closed forms; a newer one is taken for this one, and said."""

OLDEST_TRACED: Final[tuple[int, int, int]] = (0, 8, 0)
"""The oldest."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What the self-check found on the installed host: traced peak over closed form, by kind of forward."""

    kind: str
    """`dit`, `vae_decode`, `vae_encode`, `text_encode`."""
    factor: float
    host: str
    """The host version it was traced on, for the sentence that says so."""
    lowest: float | None = None
    """The smallest ratio of any shape that was traced, where they disagree: then the band spans both."""


@dataclass(frozen=True, slots=True)
class Backend:
    """How forwards run. None and `unknown` widen the band of an estimate over every possibility."""

    comfyui: tuple[int, int, int] | None = None
    """Version of ComfyUI; None: not known, taken for the newest traced."""
    fused_rope: bool | None = None
    """Rotary embedding as one kernel (comfy-kitchen with its CUDA or Triton backend), or as a chain of torch operations."""
    fused_rms_norm: bool | None = None
    """RMSNorm as one kernel (torch 2.9 and newer on a GPU), or as a chain."""
    attention: Attention = "flash"
    compiled: bool = False
    """torch.compile: its memory is not predicted, the band is wider."""
    allocator: Allocator = "unknown"
    element_bytes: int = 2
    """Bytes of one element in the diffusion model's compute dtype."""
    weight_bytes: int | None = None
    """Bytes of one element in the dtype its weights are kept in, where the file does not decide; None: the compute dtype's."""
    vae_element_bytes: int = 2
    slow_conv3d: bool = False
    """This torch has the conv3d regression of 2.9, and ComfyUI does not work around it."""
    corrections: tuple[Correction, ...] = ()


def parse_version(text: str) -> tuple[int, int, int] | None:
    """`0.33.0`, `v0.8`, `0.33.0-dev` as numbers; None where there are none."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text.strip())
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None
