"""What the text and image encoders allocate, weights excluded."""

from __future__ import annotations

from typing import Final

from .backend import Backend
from .corrections import checked, corrected
from .estimate import Estimate, Term
from .tokens import flag, whole

UMT5_DIM: Final = 4096
UMT5_FFN: Final = 10240
UMT5_HEADS: Final = 64
UMT5_VOCABULARY: Final = 256384
"""UMT5-XXL (comfy/text_encoders/umt5_config_xxl.json)."""

CLIP_DIM: Final = 1280
CLIP_FFN: Final = 5120
CLIP_TOKENS: Final = 257
"""CLIP ViT-H at its fixed 224 pixels (comfy/clip_vision_config_h.json)."""

LEAST_TOKENS: Final = 512
"""Prompts are padded to 512 tokens; a longer one is encoded whole (comfy/text_encoders/wan.py: min_length, max_length)."""

RESIDUAL: Final = 0.01
"""Band: the forms fit traces of ComfyUI 0.8.0 and 0.33.0 (torch 2.13) to 0.003 %."""

FP32: Final = 4
"""Both compute in fp32 whatever their weights are (comfy/sd1_clip.py and comfy/clip_vision.py, 0.8 and 0.33)."""


def umt5(
    tokens: int = LEAST_TOKENS,
    batch: int = 1,
    backend: Backend | None = None,
    *,
    fp8_weights: bool = False,
    fp8_embedding: bool = False,
    fp32_weights: bool = False,
) -> Estimate:
    """Peak allocated of encoding `batch` prompts of `tokens`, in bytes.

    ComfyUI encodes one prompt at a time, and with it an empty one where words of it are weighted (batch 2). `fp8_weights`: the
    layers are fp8. `fp8_embedding`: so is the table of words (plain fp8 files, not those of Comfy-Org), which is then cast to
    fp32 as a whole: 3.9 GiB. `fp32_weights`: no layer is cast. Raises ValueError that names an argument out of range.
    """
    whole("tokens", tokens, 1, 1 << 20)
    whole("batch", batch, 1, 1 << 16)
    for name, value in (("fp8_weights", fp8_weights), ("fp8_embedding", fp8_embedding), ("fp32_weights", fp32_weights)):
        flag(name, value)
    length = max(tokens, LEAST_TOKENS)
    hidden = batch * length * UMT5_DIM * FP32
    scores = UMT5_HEADS * length * length * FP32
    mask = batch * length * length * FP32
    cast = 0 if fp32_weights else UMT5_DIM * FP32
    copies = 1 if fp8_weights else 0
    moments = (
        # the second layer of the feed-forward; the biases of this block's attention and of the one before stay
        (
            Term("feed-forward", 3 * batch * length * UMT5_FFN * FP32),
            Term("weight cast buffer", cast * UMT5_FFN),
            Term("position biases", 2 * scores),
            Term("attention mask", mask),
            Term("hidden states", (3 + copies) * hidden),
        ),
        (
            Term("self-attention", 4 * hidden),
            Term("weight cast buffer", cast * UMT5_DIM),
            Term("position biases", (2 + batch) * scores),
            Term("attention mask", mask),
            Term("hidden states", (3 + copies) * hidden),
        ),
        (
            Term("word embedding as fp32", UMT5_VOCABULARY * UMT5_DIM * FP32 if fp8_embedding else 0),
            Term("hidden states", hidden),
        ),
    )
    said = (f"The prompt is longer than {LEAST_TOKENS} tokens.",) if tokens > LEAST_TOKENS else ()
    return corrected(_largest(moments, said), "text_encode", checked(backend))


def clip_vision(batch: int = 1) -> Estimate:
    """Peak allocated of CLIP ViT-H over `batch` images, in bytes. Raises ValueError that names an argument out of range."""
    whole("batch", batch, 1, 1 << 16)
    hidden = batch * CLIP_TOKENS * CLIP_DIM * FP32
    terms = (
        Term("weight cast buffer", CLIP_DIM * CLIP_FFN * FP32),
        Term("feed-forward", batch * CLIP_TOKENS * CLIP_FFN * FP32),
        Term("hidden states", 4 * hidden),
    )
    return _largest((terms,), ())


def _largest(moments: tuple[tuple[Term, ...], ...], said: tuple[str, ...]) -> Estimate:
    peak = max(moments, key=lambda terms: sum(term.bytes for term in terms))
    total = sum(term.bytes for term in peak)
    band = round(total * RESIDUAL)
    return Estimate.of(peak, below=band, above=band, assumptions=said)
