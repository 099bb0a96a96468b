"""What forwards of the real models take on a card: peaks traced from ComfyUI 0.33's own classes (tests/data/traces-0.33.json).

The simulated card is charged these. They are not what ComfyUI makes room for (`memory_required`, `memory_used_decode`), nor the
pack's own formulas: rows of the table, scaled by tokens or pixels.
"""

from typing import Any

HIDDEN_TENSORS = {1536: 16.06, 3072: 13.6, 5120: 11.13}
"""Peak of one forward in tensors of the hidden size, by width: 16 bit, RoPE and RMSNorm as chains, which a card without
comfy-kitchen's kernels runs."""

VAE_PIXEL_BYTES = {
    ("decode", False): (780, 6547, 6756, 6.125),
    ("decode", True): (2257, 7160, 7665, 6.094),
    ("encode", False): (768, 4105, 4403, 6.25),
    ("encode", True): (652, 2793, 2938, 12.188),
}
"""(what, is it the 2.2 VAE) -> bytes per pixel of one frame, of five, and of a longer clip: a + b * frames; no workspace."""

UMT5_BYTES = 381 << 20
"""512 tokens through fp8 weights in fp32."""

CLIP_VISION_BYTES = 46 << 20


def dit_peak(dim: int, shape: Any) -> int:
    """One forward for a latent of shape (batch, channels, frames, rows, columns)."""
    batch, _, frames, rows, columns = shape
    tokens = frames * -(-rows // 2) * -(-columns // 2)
    nearest = min(HIDDEN_TENSORS, key=lambda known: abs(known - dim))
    return round(batch * tokens * dim * 2 * HIDDEN_TENSORS[nearest])


def vae_peak(what: str, is_22: bool, width: int, height: int, frames: int, element_bytes: int = 2) -> int:
    """An encode or a decode of a clip in pixels."""
    one, five, a, b = VAE_PIXEL_BYTES[what, is_22]
    per_pixel = one if frames <= 1 else five if frames <= 5 else a + b * frames
    return round(width * height * per_pixel) * element_bytes // 2
