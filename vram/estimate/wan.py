"""Which model a checkpoint holds, by its keys, and what a forward of it takes.

The activation formulas here are ComfyUI's own (`memory_required`, `memory_used_decode`), so a verdict says what ComfyUI itself
will try to make room for. Against traces of the real tensors they are 1.25 to 2.25 times too high for the diffusion model and
1.3 to 1.6 for the VAE's decode, which is what `lower` stands for.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from ..units import MIB
from .checkpoint import Checkpoint

ModelKind = Literal["dit", "vae", "text_encoder", "clip_vision", "lora", "unknown"]

PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.", "")
"""What may stand before a diffusion model's keys: whole checkpoints, some exports, bare files."""

VARIANT_BY_KEY: Final = (
    ("vace_patch_embedding.weight", "VACE"),
    ("control_adapter.conv.weight", "Fun-Camera"),
    ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
)
"""First key that matches names the variant (order of ComfyUI's comfy/model_detection.py)."""

USAGE_FACTOR_DIM: Final = 2222
"""memory_usage_factor = dim / 2222 (ComfyUI comfy/supported_models.py, WAN21_T2V.__init__)."""

VACE_FACTOR: Final = 1.2
"""VACE runs extra blocks: factor x 1.2 (ComfyUI comfy/supported_models.py, WAN21_Vace.__init__)."""

DIT_OVERSTATEMENT: Final = 2.25
"""ComfyUI's DiT formula over the traced peak: 1.18 (1.3B) to 2.22 (14B); traces of ComfyUI 0.8 and 0.33 on torch 2.13."""

DIT_UNDERSTATEMENT: Final = 1.3
"""The other side: simulated reserved memory with eager RoPE is up to 1.27 times ComfyUI's formula (1.3B, 480p, 81 frames)."""

VAE_OVERSTATEMENT: Final = 2.2
"""ComfyUI's VAE constants over the traced peak: 1.3 (0.8) to 2.2 (0.33, 2.1 encode)."""

VAE_UNDERSTATEMENT: Final = 1.1
"""Simulated reserved memory with a cuDNN workspace is within 12 % of ComfyUI's VAE constants on 0.8."""

TEXT_ENCODER_ACTIVATION: Final = 381 * MIB
"""UMT5-XXL computes in fp32 from fp8 weights: 381 MiB at 512 tokens (traced, torch 2.13); prompts are padded to 512."""

TEXT_ENCODER_ACTIVATION_LONG: Final = 1926 * MIB
"""The same at 1024 tokens and batch 2, reserved (simulated allocator): the upper bound."""

CLIP_VISION_ACTIVATION: Final = 46 * MIB
"""CLIP ViT-H, fixed 224 px crop: 40 to 46 MiB (traced)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a checkpoint's keys say it is. `dim` and below are None where the kind has no such thing."""

    kind: ModelKind
    name: str
    dim: int | None = None
    layers: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    usage_factor: float | None = None
    spatial_stride: int | None = None
    """Pixels of one latent cell: 8 for the 2.1 VAE, 16 for the 2.2 one."""


UNKNOWN: Final = Architecture("unknown", "unknown")


def identify(checkpoint: Checkpoint) -> Architecture:
    """Name the model in `checkpoint` by its keys and shapes; UNKNOWN if it is none of WAN's parts."""
    keys = checkpoint.tensors.keys()
    if (dit := identify_dit(checkpoint)) is not None:
        return dit
    if "decoder.middle.0.residual.0.gamma" in keys:
        if "decoder.upsamples.0.upsamples.0.residual.2.weight" in keys:
            return Architecture("vae", "WAN 2.2 VAE", out_channels=48, spatial_stride=16)
        return Architecture("vae", "WAN 2.1 VAE", out_channels=16, spatial_stride=8)
    if "encoder.block.23.layer.1.DenseReluDense.wi_1.weight" in keys:
        return Architecture("text_encoder", "UMT5-XXL", dim=4096, layers=24)
    if any(key.endswith("SelfAttention.relative_attention_bias.weight") for key in keys):
        return Architecture("text_encoder", "T5 family")
    if "vision_model.encoder.layers.0.layer_norm1.weight" in keys or "visual.transformer.resblocks.0.ln_1.weight" in keys:
        return Architecture("clip_vision", "CLIP vision")
    if is_lora(keys):
        return Architecture("lora", "LoRA")
    return UNKNOWN


def identify_dit(checkpoint: Checkpoint) -> Architecture | None:
    """The WAN diffusion model in `checkpoint`, or None.

    High and low noise experts have equal keys, and so have a causal 1.3B and the plain one: neither is told apart here.
    """
    tensors = checkpoint.tensors
    for prefix in PREFIXES:
        modulation = tensors.get(prefix + "head.modulation")
        patch = tensors.get(prefix + "patch_embedding.weight")
        head = tensors.get(prefix + "head.head.weight")
        if modulation is None or patch is None or head is None or len(patch.shape) < 2 or not head.shape:
            continue
        dim = modulation.shape[-1] if modulation.shape else 0
        block = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
        layers = len({match.group(1) for key in tensors if (match := block.match(key))})
        in_channels, out_channels = patch.shape[1], head.shape[0] // 4
        variant = next((name for key, name in VARIANT_BY_KEY if prefix + key in tensors), None)
        image = prefix + "img_emb.proj.0.bias" in tensors
        factor = dim / USAGE_FACTOR_DIM * (VACE_FACTOR if variant == "VACE" else 1.0)
        return Architecture(
            kind="dit",
            name=f"WAN {_generation(in_channels, out_channels, image)}{_size(dim)}{f' {variant}' if variant else ''}",
            dim=dim,
            layers=layers,
            in_channels=in_channels,
            out_channels=out_channels,
            usage_factor=factor,
            spatial_stride=16 if out_channels == 48 else 8,
        )
    return None


def _generation(in_channels: int, out_channels: int, image: bool) -> str:
    if out_channels == 48:
        return "2.2 TI2V "
    if image:
        return "2.1 I2V "
    # 36 input channels without image embeddings is 2.2's image to video; 16 is text to video of either generation
    return "2.2 I2V " if in_channels == 36 else "T2V "


def _size(dim: int) -> str:
    return {1536: "1.3B", 3072: "5B", 5120: "14B"}.get(dim, f"dim {dim}")


def is_lora(keys: Collection[str]) -> bool:
    """Low-rank patches, whichever of the usual suffixes they use."""
    return any(key.endswith((".lora_down.weight", ".lora_A.weight", ".lora.down.weight")) for key in keys)


def latent_frames(frames: int) -> int:
    """Latent frames of a clip: WAN's VAE packs four after the first."""
    return (max(1, frames) - 1) // 4 + 1


def dit_memory_required(
    *,
    batch: int,
    frames: int,
    height: int,
    width: int,
    stride: int,
    usage_factor: float,
    element_bytes: int,
    flash: bool,
) -> int:
    """Bytes ComfyUI reserves for one forward (comfy/model_base.py, BaseModel.memory_required).

    frames, height and width are of the video in frames and pixels; `stride` pixels make one latent cell.
    """
    area = batch * latent_frames(frames) * (height // stride) * (width // stride)
    if flash:
        return round(area * element_bytes * 0.01 * usage_factor * MIB)
    return round(area * 0.15 * usage_factor * MIB)


def vae_decode_required(*, frames: int, height: int, width: int, stride: int, element_bytes: int) -> int:
    """Bytes ComfyUI makes room for before a decode (comfy/sd.py, VAE.__init__, WAN 2.1 and 2.2; batch is ignored)."""
    rows, columns = height // stride, width // stride
    if stride == 16:
        return 8000 * rows * columns * 256 * element_bytes
    return (2200 if latent_frames(frames) <= 4 else 7000) * rows * columns * 64 * element_bytes


def vae_encode_required(*, frames: int, height: int, width: int, stride: int, element_bytes: int) -> int:
    """Bytes ComfyUI makes room for before an encode (comfy/sd.py, VAE.__init__; pixels, batch is ignored)."""
    if stride == 16:
        return 3300 * height * width * element_bytes
    return (1500 if frames <= 4 else 6000) * height * width * element_bytes


KV_LAYERS: Final = 30
"""Layers of WAN 1.3B, which the causal models are (self-forcing, LongLive, ComfyUI's CausalAR)."""

KV_DIM: Final = 1536
"""Hidden size of WAN 1.3B."""

TEXT_TOKENS: Final = 512
"""Prompts are padded to 512 tokens; cross-attention caches keys and values of all of them."""

VAE_FEATURE_CACHE: Final = 4729
"""Bytes per pixel that the 2.1 decoder keeps between chunks in 16 bit (traced). A whole decode has it in its own peak."""

STEP_LATENTS: Final = 12
"""fp32 latents held in one sampling step with cond and uncond: 6 + 3 for each (traced through ComfyUI's sampler)."""


class VideoOverhead(NamedTuple):
    """What a video keeps beside weights and the activations of a forward, in bytes."""

    kv_cache: int
    temporal_buffer: int
    vae_cache: int

    @property
    def total(self) -> int:
        return sum(self)


def video_runtime_overhead(*, width: int, height: int, frames: int = 81, causal: bool = False) -> VideoOverhead:
    """The runtime overhead of a video of `frames` at `width` x `height` pixels.

    A causal model also keeps the keys and values of every frame it has made, and its VAE streams. Raises ValueError that names
    the size that is below 1.
    """
    for name, value in (("width", width), ("height", height), ("frames", frames)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    time, rows, columns = latent_frames(frames), -(-height // 8), -(-width // 8)
    latent = 4 * 16 * time * rows * columns
    if not causal:
        return VideoOverhead(0, STEP_LATENTS * latent, 0)
    tokens = time * -(-height // 16) * -(-width // 16)
    keys_and_values = 2 * KV_LAYERS * KV_DIM * 2
    return VideoOverhead(
        kv_cache=keys_and_values * (tokens + TEXT_TOKENS),
        temporal_buffer=STEP_LATENTS * latent,
        vae_cache=VAE_FEATURE_CACHE * width * height,
    )
