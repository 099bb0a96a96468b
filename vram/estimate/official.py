"""The forward of the authors' own WAN classes (Wan-Video), which published peaks are of: a form apart from ComfyUI's.

They keep the residual path in fp32 and rotate queries and keys in fp64: a token costs 2.2 to 5 times what it does in ComfyUI.
"""

from __future__ import annotations

from typing import Final, Literal

from .estimate import Estimate, Term
from .tokens import Video, one_of, typed, whole

Generation = Literal["2.1", "2.2"]

FP64: Final = 8
FP32: Final = 4
BF16: Final = 2

ROTATIONS: Final = 64 * 16
"""Bytes of a token's complex rotations in fp64, 64 of them (wan/modules/model.py, rope_apply)."""

TEXT_TOKENS: Final = 512

RESIDUAL: Final = 0.01
"""Band: six published peaks of the 14B models are met to 0.5 %."""


def official_forward(dim: int, video: Video, generation: Generation) -> Estimate:
    """Peak allocated of one forward of the authors' classes over `video`, in bytes, weights excluded, for the 14B's 2.1 VAE.

    The peak is the rotation of the keys: the rotated values twice in fp64 (joined, then stacked), and beside them the block's
    input and its modulated copy, the rotated queries and keys in fp32, and v. 2.1 computes q and k in fp32 from fp32 norms, 2.2
    from bf16 ones, but gives every token a time embedding of its own: six modulations of each, twice, and the embedding.

    Read off traces of wan/modules/model.py of both repositories on torch 2.13: 216,064 and 461,824 bytes a token at 5120.
    Raises ValueError that names an argument out of range.
    """
    whole("dim", dim, 1, 1 << 20)
    typed("video", video, Video)
    one_of("generation", generation, ("2.1", "2.2"))
    latent = video.latent(8)
    tokens = latent.batch * latent.tokens
    hidden = tokens * dim
    norms = FP32 if generation == "2.1" else BF16
    modulations = (2 * 6 + 1) * FP32 if generation == "2.2" else 0
    terms = (
        Term("rotation in double precision", 2 * FP64 * hidden + ROTATIONS * tokens),
        Term("rotated queries and keys", 2 * FP32 * hidden),
        Term("queries, keys and values", (2 * norms + BF16) * hidden),
        Term("hidden states", 2 * FP32 * hidden),
        Term("time embedding", modulations * hidden),
        Term("text tokens", BF16 * latent.batch * TEXT_TOKENS * dim),
    )
    total = sum(term.bytes for term in terms)
    return Estimate.of(terms, below=round(total * RESIDUAL), above=round(total * RESIDUAL))
