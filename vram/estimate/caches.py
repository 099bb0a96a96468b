"""What a video keeps between forwards: keys and values of causal models, buffers of frames, features of a streaming VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from .dit_shape import TEXT_TOKENS, DitShape
from .estimate import Estimate, Term
from .sampling import COND_LATENTS, SAMPLER_LATENTS
from .tokens import MOST_FRAMES, MOST_PIXELS, Latent, Video, flag, short, typed, whole

Pipeline = Literal[
    "comfyui",
    "comfyui_causal",
    "self_forcing",
    "longlive",
    "memflow",
    "reward_forcing",
    "streamdiffusionv2",
    "krea_realtime_video",
]
"""`comfyui`: not causal, any WAN in ComfyUI. `comfyui_causal`: its WAN21_CausalAR (0.33 and newer), which runs self-forcing and
causal-forcing checkpoints. `self_forcing`: the authors' own loop. The others are the pipelines of Daydream Scope."""

FEATURES: Final[Mapping[tuple[str, str], float]] = MappingProxyType(
    {("2.1", "decode"): 4729.0, ("2.1", "encode"): 2808.0, ("2.2", "decode"): 3568.75, ("2.2", "encode"): 1177.0}
)
"""Bytes per pixel that a VAE keeps between chunks in 16 bit, by VAE and way (traced on ComfyUI 0.8.0, torch 2.13). In ComfyUI
they are part of a decode's own peak and go with it; a streaming VAE keeps them beside the diffusion model."""

CELL: Final = 8
"""Pixels of one latent cell of the 2.1 VAE, which all causal WANs use."""

LATENT_CHANNELS: Final = 16


@dataclass(frozen=True, slots=True)
class Causal:
    """What a causal pipeline caches. Sizes in latent frames; None: the whole clip."""

    layers: int = 30
    dim: int = 1536
    """WAN 1.3B: 30 layers of 1536."""
    window: int | None = None
    """Frames whose keys and values stay."""
    bank: int = 0
    """Frames of a memory bank beside the window."""
    block: int = 1
    """Frames made at once."""
    copies: bool = False
    """Keys and values of the block are kept for every layer until its end, and one layer's window is cloned."""
    streams: bool = True
    """Frames are decoded as they come: the VAE keeps its features."""
    decoded_frames: int = 0
    """RGB frames kept to be encoded again."""
    context_latents: int = 0


PIPELINES: Final[Mapping[str, Causal | None]] = MappingProxyType(
    {
        "comfyui": None,
        "comfyui_causal": Causal(streams=False),
        "self_forcing": Causal(streams=False, block=3),
        "longlive": Causal(window=12, block=3, copies=True),
        "memflow": Causal(window=12, bank=4, block=3, copies=True),
        "reward_forcing": Causal(window=9, block=3),
        "streamdiffusionv2": Causal(window=6),
        "krea_realtime_video": Causal(layers=40, dim=5120, window=6, block=3, decoded_frames=9, context_latents=2),
    }
)
"""ComfyUI: caches for the whole clip, made up front (comfy/k_diffusion/sampling.py, sample_ar_video; comfy/ldm/wan/ar_model.py,
init_kv_caches). Scope at commit 68b0f956: LongLive attends to 12 frames of which 3 stay, in blocks of 3; MemFlow adds a bank of
3 + 1; Reward Forcing keeps 9 and StreamDiffusion v2 6, in place; Krea is a 14B with 3 cached frames and a block of 3, 9 decoded
frames and 2 latents of context. Self-forcing's own loop keeps the clip (wan/modules/causal_model.py)."""

SIZE_BYTES: Final = 2
"""All of them cache in 16 bit."""


class VideoOverhead(NamedTuple):
    """What a video keeps beside weights and the activations of a forward, in bytes."""

    kv_cache: int
    """Keys and values, of the video and of the text."""
    temporal_buffer: int
    """Latents and frames between steps and chunks."""
    vae_cache: int

    @property
    def total(self) -> int:
        return sum(self)


def kv_cache(latent: Latent, *, layers: int, dim: int, window: int | None = None, element_bytes: int = SIZE_BYTES) -> int:
    """Bytes of the keys and values of `window` frames of `latent`; None: of all.

    Raises ValueError that names an argument out of range.
    """
    typed("latent", latent, Latent)
    whole("layers", layers, 1, 1 << 16)
    whole("dim", dim, 1, 1 << 20)
    whole("element_bytes", element_bytes, 1, 8)
    frames = latent.frames if window is None else whole("window", window, 0, 1 << 20)
    return 2 * layers * latent.batch * frames * latent.tokens_per_frame * dim * element_bytes


def cross_attention_cache(*, layers: int, dim: int, batch: int = 1, element_bytes: int = SIZE_BYTES) -> int:
    """Bytes of the keys and values of the text, made by the first block: 90 MiB of a 1.3B, 400 MiB of a 14B. Raises ValueError
    that names an argument out of range."""
    whole("layers", layers, 1, 1 << 16)
    whole("dim", dim, 1, 1 << 20)
    whole("batch", batch, 1, 1 << 16)
    whole("element_bytes", element_bytes, 1, 8)
    return 2 * layers * batch * TEXT_TOKENS * dim * element_bytes


def causal_caches(shape: DitShape, video: Video, element_bytes: int = SIZE_BYTES) -> Estimate:
    """What ComfyUI's causal WAN holds from before the first block until after the last, in bytes.

    It grows with the clip and is made up front: exactly known. Raises ValueError that names an argument out of range.
    """
    typed("shape", shape, DitShape)
    typed("video", video, Video)
    latent = shape.latent(video)
    keys = kv_cache(latent, layers=shape.layers, dim=shape.dim, element_bytes=element_bytes)
    text = cross_attention_cache(layers=shape.layers, dim=shape.dim, batch=latent.batch, element_bytes=element_bytes)
    return Estimate.of((Term("keys and values of the video", keys), Term("keys and values of the text", text)))


def pose_cache(latent: Latent, *, layers: int, dim: int, bits: int) -> int:
    """Bytes that Animate 2's cache node keeps while a sampler runs: the pose branch's input of every block, for one clip of the
    batch (ComfyUI comfy/ldm/wan/model_animate2.py, PoseBranchCache, 0.33).

    `latent`: of the pose video, which is the clip without its reference frame. `bits` of one value: 16 in fp16 and bf16, 8 or 4
    with a scale of 4 bytes a token. Raises ValueError that names an argument out of range.
    """
    typed("latent", latent, Latent)
    whole("layers", layers, 1)
    whole("dim", dim, 1)
    whole("bits", bits, 4, 32)
    tokens = latent.frames * -(-latent.rows // 2) * -(-latent.columns // 2)
    return layers * tokens * (dim * bits // 8 + (4 if bits < 16 else 0))


def vae_features(kind: str, way: str, width: int, height: int) -> int:
    """Bytes that a streaming VAE keeps between chunks in 16 bit. Raises ValueError that names an argument out of range."""
    whole("width", width, 0, MOST_PIXELS)
    whole("height", height, 0, MOST_PIXELS)
    found = FEATURES.get((kind, way)) if isinstance(kind, str) and isinstance(way, str) else None
    if found is None:
        raise ValueError(f"kind and way must be 2.1 or 2.2 and decode or encode, not {short(kind)} and {short(way)}")
    return round(found * 4) * width * height // 4


def video_runtime_overhead(
    *,
    width: int,
    height: int,
    frames: int = 81,
    causal: bool = False,
    pipeline: Pipeline | None = None,
    video_input: bool = False,
) -> VideoOverhead:
    """What a video of `frames` at `width` x `height` pixels keeps beside weights and activations.

    `pipeline`: which loop makes it; None: ComfyUI's, with `causal` its causal one. `video_input`: a streaming pipeline that is
    given a video also keeps the features of its encoder. Raises ValueError that names what is below 1, too large or unknown.
    """
    whole("width", width, 1, MOST_PIXELS)
    whole("height", height, 1, MOST_PIXELS)
    whole("frames", frames, 1, MOST_FRAMES)
    flag("causal", causal)
    flag("video_input", video_input)
    if pipeline is None:
        pipeline = "comfyui_causal" if causal else "comfyui"
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, not {short(pipeline)}")
    latent = _at_least_one(width, height, frames)
    rules = PIPELINES[pipeline]
    one = 4 * LATENT_CHANNELS * latent.rows * latent.columns
    if rules is None:
        # a step with prompt and negative prompt, as ComfyUI samples unless cfg is 1; the model's own copy of the latent is half
        # as large, and twice there
        held = SAMPLER_LATENTS + COND_LATENTS * 2 + SAMPLER_LATENTS
        return VideoOverhead(0, held * one * latent.frames, 0)
    return _causal(rules, latent, one, width, height, video_input)


def _at_least_one(width: int, height: int, frames: int) -> Latent:
    """The latent, sides rounded up: a size that is no multiple of a cell must not count for less."""
    return Latent(1, Video(width, height, frames).latent(CELL).frames, -(-height // CELL), -(-width // CELL))


def _causal(rules: Causal, latent: Latent, one: int, width: int, height: int, video_input: bool) -> VideoOverhead:
    window = latent.frames if rules.window is None else rules.window + rules.bank
    keys = kv_cache(latent, layers=rules.layers, dim=rules.dim, window=window)
    keys += cross_attention_cache(layers=rules.layers, dim=rules.dim)
    if rules.copies:
        keys += kv_cache(latent, layers=rules.layers, dim=rules.dim, window=rules.block)
        keys += kv_cache(latent, layers=1, dim=rules.dim, window=rules.window)
    if not rules.streams:
        # the noise, the latent and the input of the whole clip, and the output that fills up (sample_ar_video)
        return VideoOverhead(keys, (SAMPLER_LATENTS + 1) * one * latent.frames, 0)
    latents = (SAMPLER_LATENTS + COND_LATENTS) * rules.block + rules.context_latents
    pictures = rules.decoded_frames * 3 * width * height * SIZE_BYTES
    features = vae_features("2.1", "decode", width, height)
    if video_input:
        features += vae_features("2.1", "encode", width, height)
    return VideoOverhead(keys, latents * one + pictures, features)
