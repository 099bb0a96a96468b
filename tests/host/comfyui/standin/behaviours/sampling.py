"""Samplers: the real order of calls, on tiny models."""

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, flow_sigmas
from comfy.samplers import ksampler as sampler_named
from comfy.utils import ProgressBar

from . import node

DEFAULT_SHIFT = 8.0


@node("ModelSamplingSD3", "patch")
def model_sampling_sd3(model: ModelPatcher, shift: float) -> tuple[ModelPatcher]:
    patched = model.clone()
    patched.add_object_patch("model_sampling", {"shift": shift})
    return (patched,)


def sample(
    model: ModelPatcher,
    sigmas: torch.Tensor,
    seed: int,
    cfg: float,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    add_noise: bool,
    steps: int,
    sampler_name: str,
) -> dict[str, Any]:
    given = latent["samples"].float()
    channels = model.get_model_object("latent_format").latent_channels
    if given.shape[1] != channels and torch.count_nonzero(given) == 0:
        given = torch.zeros(given.shape[0], channels, *given.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(given.shape, generator=generator) if add_noise else torch.zeros_like(given)
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    bar = ProgressBar(steps)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        bar.update_absolute(step + 1, total)

    samples = guider.sample(noise, given, sampler_named(sampler_name), sigmas, callback=callback, seed=seed)
    return {**latent, "samples": samples}


def _sigmas(model: ModelPatcher, steps: int, denoise: float = 1.0) -> torch.Tensor:
    sampling = model.object_patches.get("model_sampling", {"shift": DEFAULT_SHIFT})
    return flow_sigmas(steps, sampling["shift"], denoise)


@node("KSampler", "sample")
def ksampler(
    model: ModelPatcher,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    denoise: float = 1.0,
) -> tuple[dict[str, Any]]:
    sigmas = _sigmas(model, steps, denoise)
    return (sample(model, sigmas, seed, cfg, positive, negative, latent_image, True, steps, sampler_name),)


@node("KSamplerAdvanced", "sample")
def ksampler_advanced(
    model: ModelPatcher,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
    denoise: float = 1.0,
) -> tuple[dict[str, Any]]:
    sigmas = _sigmas(model, steps, denoise)
    if end_at_step < len(sigmas) - 1:
        sigmas = sigmas[: end_at_step + 1].clone()
        if return_with_leftover_noise == "disable":
            sigmas[-1] = 0
    if start_at_step >= len(sigmas) - 1:
        return (latent_image,)
    sigmas = sigmas[start_at_step:]
    noisy = add_noise == "enable"
    return (sample(model, sigmas, noise_seed, cfg, positive, negative, latent_image, noisy, steps, sampler_name),)
