"""Sampling in ComfyUI's order of calls, with one flow-matching Euler step whatever the sampler is called."""

from collections.abc import Callable
from typing import Any

import torch
from comfy_execution.utils import get_executing_context
from standin import peaks, settings
from standin.card import Booked
from standin.holds import holds
from standin.streaming import forward

from . import model_management, sampler_helpers
from .model_patcher import ModelPatcher
from .patcher_extension import WrapperExecutor, WrappersMP, copy_nested_dicts, get_all_wrappers

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]


STEP = "standin_step"  # in the model options: which step this forward belongs to


def flow_sigmas(steps: int, shift: float, denoise: float = 1.0) -> torch.Tensor:
    """Evenly spaced times from 1 to 0, shifted towards the noisy end as ModelSamplingSD3 does."""
    if denoise <= 0:
        return torch.zeros(0)
    total = int(steps / denoise) if denoise < 1 else steps
    times = torch.linspace(1, 0, total + 1)
    return (shift * times / (1 + (shift - 1) * times))[-(steps + 1) :]


class EulerSampler:
    def sample(
        self,
        guider: "CFGGuider",
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callback | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        total = len(sigmas) - 1
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent_image
        for step in range(total):
            extra_args["model_options"][STEP] = step
            velocity = guider.outer_predict_noise(x, sigmas[step : step + 1], extra_args["model_options"], None)
            if callback is not None:
                callback(step, x - sigmas[step] * velocity, x, total)
            x = x + (sigmas[step + 1] - sigmas[step]) * velocity
        return x


def _take_time(step: int) -> None:
    """Inside a forward, while its activations are on the card: where a test may hold the worker, and an interrupt is seen."""
    context = get_executing_context()
    stopped = model_management.processing_interrupted
    if context is not None:
        holds.reach(context.node_id, step, stopped)
    holds.pace(settings.current().step_seconds, stopped)
    model_management.throw_exception_if_processing_interrupted()


class CFGGuider:
    def __init__(self, model_patcher: ModelPatcher) -> None:
        self.model_patcher = model_patcher
        self.model_options = model_patcher.model_options
        self.original_conds: dict[str, Any] = {}
        self.conds: dict[str, Any] = {}
        self.cfg = 1.0
        self.inner_model: Any = None

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.original_conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def outer_predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], seed: int | None
    ) -> torch.Tensor:
        wrappers = get_all_wrappers(WrappersMP.PREDICT_NOISE, self.model_options, is_model_options=True)
        return WrapperExecutor.new_class_executor(self.predict_noise, self, wrappers).execute(x, timestep, model_options, seed)

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> torch.Tensor:
        positive, negative = self.conds["positive"], self.conds["negative"]
        # At cfg 1 the negative side would be multiplied by zero: ComfyUI leaves it out.
        wanted = [positive] if self.cfg == 1.0 else [positive, negative]
        outputs = calc_cond_batch(self.inner_model, wanted, x, timestep, model_options)
        return outputs[0] if len(outputs) == 1 else outputs[1] + (outputs[0] - outputs[1]) * self.cfg

    def sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: EulerSampler,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: Callback | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> torch.Tensor:
        if sigmas.shape[-1] <= 1:
            return latent_image
        self.conds = dict(self.original_conds)
        before = self.model_options
        self.model_options = copy_nested_dicts(before)
        try:
            sampler_helpers.prepare_model_patcher(self.model_patcher, self.conds, self.model_options)
            wrappers = get_all_wrappers(WrappersMP.OUTER_SAMPLE, self.model_options, is_model_options=True)
            return WrapperExecutor.new_class_executor(self.outer_sample, self, wrappers).execute(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
            )
        finally:
            self.model_options = before

    def outer_sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: EulerSampler,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: Callback | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> torch.Tensor:
        self.inner_model, self.conds, _ = sampler_helpers.prepare_sampling(
            self.model_patcher, noise.shape, self.conds, self.model_options
        )
        try:
            self.model_patcher.pre_run()
            extra_args = {"model_options": copy_nested_dicts(self.model_options), "seed": seed}
            wrappers = get_all_wrappers(WrappersMP.SAMPLER_SAMPLE, extra_args["model_options"], is_model_options=True)
            executor = WrapperExecutor.new_class_executor(sampler.sample, sampler, wrappers)
            return executor.execute(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        finally:
            self.model_patcher.cleanup()
            self.inner_model = None


def calc_cond_batch(
    model: Any, conds: list[Any], x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    wrappers = get_all_wrappers(WrappersMP.CALC_COND_BATCH, model_options, is_model_options=True)
    return WrapperExecutor.new_executor(_calc_cond_batch, wrappers).execute(model, conds, x_in, timestep, model_options)


def _calc_cond_batch(
    model: Any, conds: list[Any], x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    """All sides in one forward where 1.5 times its estimate is free, else one after the other."""
    patcher = model.current_patcher
    patcher.prepare_state(timestep, model_options)
    together = [len(conds) * x_in.shape[0], *x_in.shape[1:]]
    batched = model.memory_required(together) * 1.5 < patcher.get_free_memory(patcher.load_device)
    outputs: list[torch.Tensor] = []
    for group in [conds] if batched else [[cond] for cond in conds]:
        x = torch.cat([x_in] * len(group))
        text = torch.cat([cond[0][0].expand(x_in.shape[0], -1, -1) for cond in group])
        concat = [cond[0][1].get("concat_latent_image") for cond in group]
        joined = torch.cat(concat) if all(part is not None for part in concat) else None
        with Booked(peaks.dit_peak(model.dim, x.shape), f"{model.__class__.__name__} activations", patcher.load_device):
            out = _apply_model(model, x, timestep, joined, text, model_options)
        outputs.extend(out.chunk(len(group)))
    return outputs


def _apply_model(
    model: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    concat: torch.Tensor | None,
    text: torch.Tensor,
    model_options: dict[str, Any],
) -> torch.Tensor:
    def diffusion_model(x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None) -> Any:
        with forward(model.current_patcher):
            _take_time(model_options.get(STEP, 0))
            wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, model_options, is_model_options=True)
            executor = WrapperExecutor.new_class_executor(model.apply_model, model.diffusion_model, wrappers)
            return executor.execute(x, t, c_concat, c_crossattn)

    wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, model_options, is_model_options=True)
    times = timestep.expand(x.shape[0])
    executor = WrapperExecutor.new_class_executor(diffusion_model, model, wrappers)
    gain = 1.0 + 0.01 * sum(strength for patches in model.current_patcher.patches.values() for strength, *_ in patches)
    return executor.execute(x, times, concat, text) * gain
