"""Text, images and start frames into what a sampler is conditioned on."""

from typing import Any

import comfy.sd
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.utils import common_upscale

from . import node

Conditioning = list[list[Any]]


@node("CLIPTextEncode", "encode")
def encode_text(text: str, clip: comfy.sd.CLIP) -> tuple[Conditioning]:
    return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)


@node("CLIPVisionEncode", "encode")
def encode_vision(clip_vision: ClipVisionModel, image: torch.Tensor, crop: str) -> tuple[Any]:
    return (clip_vision.encode_image(image, crop=crop == "center"),)


@node("ConditioningZeroOut", "zero_out")
def zero_out(conditioning: Conditioning) -> tuple[Conditioning]:
    return ([[torch.zeros_like(cond), dict(options)] for cond, options in conditioning],)


def with_values(conditioning: Conditioning, values: dict[str, Any]) -> Conditioning:
    return [[cond, options | values] for cond, options in conditioning]


@node("WanImageToVideo")
def wan_image_to_video(
    positive: Conditioning,
    negative: Conditioning,
    vae: comfy.sd.VAE,
    width: int,
    height: int,
    length: int,
    batch_size: int,
    start_image: torch.Tensor | None = None,
    clip_vision_output: Any = None,
) -> tuple[Conditioning, Conditioning, dict[str, Any]]:
    latent = torch.zeros(batch_size, 16, (length - 1) // 4 + 1, height // 8, width // 8)
    values: dict[str, Any] = {}
    if start_image is not None:
        start = common_upscale(start_image[:length].movedim(-1, 1), width, height, "bilinear", "center").movedim(1, -1)
        frames = torch.full((length, height, width, 3), 0.5)
        frames[: start.shape[0]] = start[..., :3]
        values["concat_latent_image"] = vae.encode(frames)
    if clip_vision_output is not None:
        values["clip_vision_output"] = clip_vision_output
    return with_values(positive, values), with_values(negative, values), {"samples": latent}
