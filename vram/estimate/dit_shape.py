"""What the memory of a WAN diffusion model depends on, and ComfyUI's own figure for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..units import MIB
from .tokens import Latent, Video, flag, one_of, short, typed, whole

TEXT_TOKENS: Final = 512
"""Prompts are padded to 512 tokens (comfy/text_encoders/wan.py, min_length)."""

TEXT_DIM: Final = 4096
"""Width of UMT5-XXL's output."""

HEAD_DIM: Final = 128
"""Of every WAN (comfy/model_detection.py: num_heads = dim // 128)."""

VARIANTS: Final = (
    "t2v",
    "i2v",
    "flf2v",
    "i2v_2.2",
    "ti2v",
    "vace",
    "fun_control",
    "fun_inp",
    "fun_control_2.2",
    "camera",
    "camera_2.2",
    "s2v",
    "humo",
    "animate",
    "animate2",
    "scail",
    "scail2",
    "wandancer",
    "causal",
    "flow_rvs",
)


@dataclass(frozen=True, slots=True)
class DitShape:
    """What the memory of a diffusion model's forward depends on, read off its weights and its conditions."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    in_channels: int
    """Of the latent with what is concatenated to it."""
    out_channels: int
    """Of the latent: 48 of the 2.2 VAE (16 pixels a cell), else 16 (8 pixels)."""
    variant: str = "t2v"
    """One of VARIANTS."""
    vace_layers: int = 0
    image_tokens: int = 0
    """Of a CLIP image that cross-attention sees beside the text: 257, of a first and a last one 514."""
    reference_frames: int = 0
    """Latent frames whose tokens the model itself joins to those of the video: a reference image of S2V, HuMo, SCAIL or 2.2
    Fun-Control."""
    leading_frames: int = 0
    """Latent frames that the node puts in front of those of the video: the reference of Animate and of VACE."""
    motion: bool = False
    """S2V goes on from the end of an earlier video."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("dim", self.dim, 1, 1 << 20),
            ("ffn_dim", self.ffn_dim, 1, 1 << 24),
            ("heads", self.heads, 1, 1 << 16),
            ("layers", self.layers, 1, 1 << 16),
            ("in_channels", self.in_channels, 1, 1 << 16),
            ("out_channels", self.out_channels, 1, 1 << 16),
            ("vace_layers", self.vace_layers, 0, 1 << 16),
            ("image_tokens", self.image_tokens, 0, 1 << 20),
            ("reference_frames", self.reference_frames, 0, 1 << 20),
            ("leading_frames", self.leading_frames, 0, 1 << 20),
        ):
            whole(name, value, least, most)
        one_of("variant", self.variant, VARIANTS)
        flag("motion", self.motion)

    @property
    def stride(self) -> int:
        """Pixels of one latent cell."""
        return 16 if self.out_channels == 48 else 8

    def latent(self, video: Video) -> Latent:
        """The latent it is given."""
        plain = video.latent(self.stride)
        return plain._replace(frames=plain.frames + self.leading_frames) if plain.frames else plain

    def tokens(self, latent: Latent) -> int:
        """Tokens of one clip that its blocks see, with those of references, poses and motion."""
        per_frame = latent.tokens_per_frame
        joined = self.reference_frames
        if self.variant == "scail" and latent.frames:
            # the pose is half as large in both directions, and padded to whole patches as well (WanSCAILToVideo)
            pose = -(-(latent.rows // 2) // 2) * -(-(latent.columns // 2) // 2)
            return latent.tokens + joined * per_frame + latent.frames * pose
        return latent.tokens + joined * per_frame + (motion_tokens(latent) if self.motion else 0)


def motion_tokens(latent: Latent) -> int:
    """Tokens that S2V packs its motion into: one frame as it is, two in patches of 4, sixteen in patches of 4 x 8 x 8."""
    once = (latent.rows // 2) * (latent.columns // 2)
    twice = (latent.rows // 4) * (latent.columns // 4)
    return once + twice + 4 * (latent.rows // 8) * (latent.columns // 8)


USAGE_FACTOR_DIM: Final = 2222
"""memory_usage_factor = dim / 2222 (ComfyUI comfy/supported_models.py, WAN21_T2V.__init__, 0.8 and 0.33)."""

VACE_FACTOR: Final = 1.2
"""VACE: that times 1.2 (ComfyUI comfy/supported_models.py, WAN21_Vace.__init__, 0.8 and 0.33)."""


def host_usage_factor(shape: DitShape) -> float:
    """ComfyUI's memory_usage_factor of this model."""
    return shape.dim / USAGE_FACTOR_DIM * (VACE_FACTOR if shape.variant == "vace" else 1.0)


def host_memory_required(
    latent: Latent, *, usage_factor: float, element_bytes: int, flash: bool = True, more_cells: int = 0
) -> int:
    """Bytes that ComfyUI itself reserves for one forward, by which it places weights and batches conditions
    (comfy/model_base.py, BaseModel.memory_required, 0.8 and 0.33). It is 0.8 to 2.2 times what the forward allocates.

    `more_cells` are those of conditions it counts: S2V's reference and 1.5 frames of its motion. Raises ValueError that names
    an argument out of range.
    """
    typed("latent", latent, Latent)
    whole("element_bytes", element_bytes, 1, 8)
    whole("more_cells", more_cells, 0)
    flag("flash", flash)
    if isinstance(usage_factor, bool) or not isinstance(usage_factor, (int, float)) or not 0 <= usage_factor <= 1e6:
        raise ValueError(f"usage_factor must be a number from 0 to 1000000, not {short(usage_factor)}")
    area = latent.cells + more_cells
    return round(area * element_bytes * 0.01 * usage_factor * MIB if flash else area * 0.15 * usage_factor * MIB)
