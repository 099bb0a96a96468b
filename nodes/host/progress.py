"""How far a sampler has come, in ComfyUI's own terms: the index of a sigma, and the latent it had there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

ONE_CALL: Final = frozenset(
    {
        "euler",
        "euler_cfg_pp",
        "euler_ancestral",
        "euler_ancestral_cfg_pp",
        "lms",
        "ddpm",
        "lcm",
        "dpmpp_2m",
        "dpmpp_2m_cfg_pp",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "ipndm",
        "ipndm_v",
        "deis",
        "res_multistep",
        "res_multistep_cfg_pp",
        "res_multistep_ancestral",
        "res_multistep_ancestral_cfg_pp",
        "gradient_estimation",
        "gradient_estimation_cfg_pp",
        "er_sde",
        "unipc",
        "unipc_bh2",
    }
)
"""Samplers (comfy/k_diffusion/sampling.py, comfy/extra_samplers/uni_pc.py, 0.33) that call the model once in a step, at its
sigma: what they call it with is the latent that the steps before have left. Others are known by what they tell a
callback."""

EXACT: Final = frozenset({"euler"})
"""A step of these depends on nothing but the latent."""


class Reached(NamedTuple):
    """Where a sampling stood."""

    step: int
    """Of the sigma, in those this sampling was given: so many of its steps are done."""
    sigma: float
    latent: torch.Tensor
    """As ComfyUI's KSampler (Advanced) returns it with leftover noise."""


class SamplingRun:
    """One run of a sampler. It holds the sampler's newest latent, which the sampler holds as well, and copies nothing."""

    def __init__(self, sampler: Any, guider: Any, sigmas: torch.Tensor, seed: int | None = None, masked: bool = False) -> None:
        """`sampler`, `guider`: ComfyUI's objects. `masked`: only a part of the latent is sampled."""
        self._guider = guider
        self._sigmas = sigmas
        self.seed = seed
        self.masked = masked
        self.steps = max(0, len(sigmas) - 1)
        self.sampler = _name(sampler)
        self.cached = "easycache" in getattr(guider, "model_options", {}).get("transformer_options", {})
        self._called: tuple[torch.Tensor, torch.Tensor] | None = None
        self._told: tuple[int, torch.Tensor] | None = None

    @property
    def exact(self) -> bool:
        """Going on from its latent gives what going on without the error would have given."""
        return self.sampler in EXACT and not self.masked and not self.cached

    def saw(self, x: torch.Tensor, timestep: torch.Tensor) -> None:
        """The sampler calls its model."""
        self._called = (x, timestep)

    def noting(self, callback: Callable[..., Any] | None) -> Callable[..., Any]:
        """A callback for the sampler, which tells its own."""

        def noted(step: int, denoised: Any, x: Any, total: int, *more: Any) -> Any:
            self._told = (int(step), x)
            return callback(step, denoised, x, total, *more) if callback is not None else None

        return noted

    def reached(self) -> Reached | None:
        """What the completed steps have left; None where there is none yet, or this sampler keeps it where nobody sees it.

        Waits for the card.
        """
        found = self._state()
        model = getattr(self._guider, "inner_model", None)
        if found is None or model is None or self.sampler == "ar_video":
            return None
        index, x = found
        if not isinstance(x, torch.Tensor) or x.ndim < 4:
            return None
        sigma = self._sigmas[index]
        unscaled = model.model_sampling.inverse_noise_scaling(sigma.to(x.device), x)
        return Reached(index, float(sigma), model.process_latent_out(unscaled.to(torch.float32)).cpu())

    @property
    def done(self) -> int:
        """Steps whose end the sampler has told of, or shown by beginning the next."""
        found = self._state()
        return 0 if found is None else found[0]

    def _state(self) -> tuple[int, torch.Tensor] | None:
        if self.sampler in ONE_CALL and self._called is not None:
            x, timestep = self._called
            index = self._index_of(float(timestep.flatten()[0]))
            if index is not None:
                return (index, x) if index > 0 else None
        # what a callback is told of step n is the latent that the step began with
        return self._told if self._told is not None and self._told[0] > 0 else None

    def _index_of(self, sigma: float) -> int | None:
        known = [float(one) for one in self._sigmas[:-1]]
        return next((index for index, one in enumerate(known) if math.isclose(one, sigma, rel_tol=1e-5)), None)


def _name(sampler: Any) -> str:
    """As the menus of ComfyUI's nodes name it, where it is one of those."""
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__)
    return name.removeprefix("sample_").removesuffix("_function")
