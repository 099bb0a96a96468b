"""Sampling in ComfyUI's order of calls, with samplers of one model call a step."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
Model = Callable[..., torch.Tensor]

STEP = "standin_step"  # in the options of a forward: which step it belongs to


def flow_sigmas(steps: int, shift: float, denoise: float = 1.0) -> torch.Tensor:
    """Evenly spaced times from 1 to 0, shifted towards the noisy end as ModelSamplingSD3 does."""
    if denoise <= 0:
        return torch.zeros(0)
    total = int(steps / denoise) if denoise < 1 else steps
    times = torch.linspace(1, 0, total + 1)
    return (shift * times / (1 + (shift - 1) * times))[-(steps + 1) :]


def sample_euler(
    model: Model, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any = None, disable: Any = None
) -> torch.Tensor:
    for step in range(len(sigmas) - 1):
        extra_args["model_options"]["transformer_options"][STEP] = step
        denoised = model(x, sigmas[step : step + 1], **extra_args)
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
        x = x + (sigmas[step + 1] - sigmas[step]) * (x - denoised) / sigmas[step]
    return x


def sample_euler_ancestral(
    model: Model, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any = None, disable: Any = None
) -> torch.Tensor:
    """New noise in each step, from torch's own generator."""
    torch.manual_seed(extra_args.get("seed") or 0)
    for step in range(len(sigmas) - 1):
        extra_args["model_options"]["transformer_options"][STEP] = step
        denoised = model(x, sigmas[step : step + 1], **extra_args)
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
        x = denoised + sigmas[step + 1] * ((x - denoised) / sigmas[step] + 0.1 * torch.randn(x.shape))
    return x


def sample_ar_video(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any = None, disable: Any = None
) -> torch.Tensor:
    """Frame by frame, each with what the model kept of those before (0.33, k_diffusion/sampling.py)."""
    options = extra_args["model_options"]["transformer_options"]
    causal, frames = model.inner_model.inner_model.diffusion_model, x.shape[2]
    kept = {"kv_caches": causal.init_kv_caches(x.shape[0], frames), "crossattn_caches": causal.init_crossattn_caches()}
    output, steps = torch.zeros_like(x), len(sigmas) - 1
    options["ar_state"] = kept
    try:
        for frame in range(frames):
            noisy = x[:, :, frame : frame + 1]
            before = [cache["end"] for cache in kept["kv_caches"]]
            for step in range(steps):
                denoised = model(noisy, sigmas[step : step + 1], **extra_args)
                if callback is not None:
                    callback({"x": noisy, "i": frame * steps + step, "sigma": sigmas[step], "denoised": denoised})
                torch.manual_seed((extra_args.get("seed") or 0) + frame * 1000 + step)
                later = sigmas[step + 1]
                noisy = (1.0 - later) * denoised + later * torch.randn(denoised.shape)
                for cache, end in zip(kept["kv_caches"], before, strict=True):
                    cache["end"] = end
            output[:, :, frame : frame + 1] = noisy
            model(noisy, torch.zeros(1), **extra_args)
    finally:
        options.pop("ar_state", None)
    return output


class KSAMPLER:
    def __init__(self, sampler_function: Callable[..., torch.Tensor]) -> None:
        self.sampler_function = sampler_function

    def sample(
        self,
        model_wrap: "CFGGuider",
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callback | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        sampling, total = model_wrap.inner_model.model_sampling, len(sigmas) - 1
        x = sampling.noise_scaling(sigmas[0], noise, latent_image)

        def told(now: dict[str, Any]) -> None:
            if callback is not None:
                callback(now["i"], now["denoised"], now["x"], total)

        samples = self.sampler_function(_Wrapped(model_wrap), x, sigmas, extra_args=extra_args, callback=told)
        return sampling.inverse_noise_scaling(sigmas[-1], samples)


class _Wrapped:
    """The guider as a sampler calls it."""

    def __init__(self, inner_model: "CFGGuider") -> None:
        self.inner_model = inner_model

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> torch.Tensor:
        return self.inner_model.outer_predict_noise(x, sigma, model_options, seed)


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {"euler_ancestral": sample_euler_ancestral, "ar_video": sample_ar_video}


def ksampler(sampler_name: str) -> KSAMPLER:
    """A stand-in's sampler: whatever is not known here is an Euler step."""
    return KSAMPLER(FUNCTIONS.get(sampler_name, sample_euler))


@contextmanager
def on_card_while(model: Any, x: torch.Tensor, options: dict[str, Any]) -> Iterator[None]:
    """A forward's activations are booked, its elastic layers brought; a test may hold the worker here, interrupts are seen."""
    patcher = model.current_patcher
    activations = Booked(peaks.dit_peak(model.dim, x.shape), f"{model.__class__.__name__} activations", patcher.load_device)
    with activations, forward(patcher):
        _take_time(options.get(STEP, 0))
        yield


def _take_time(step: int) -> None:
    context = get_executing_context()
    stopped = model_management.processing_interrupted
    if context is not None:
        holds.reach(context.node_id, step, stopped)
    holds.pace(settings.current().step_seconds, stopped)
    model_management.throw_exception_if_processing_interrupted()


class Cond(NamedTuple):
    """One side of the guidance in one sampling."""

    text: torch.Tensor
    concat: torch.Tensor | None
    uuid: uuid.UUID


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
        sampler: KSAMPLER,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: Callback | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> torch.Tensor:
        if sigmas.shape[-1] <= 1:
            return latent_image
        self.conds = {
            name: Cond(cond[0][0], cond[0][1].get("concat_latent_image"), uuid.uuid4())
            for name, cond in self.original_conds.items()
        }
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
        sampler: KSAMPLER,
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
            latent_image = self.inner_model.process_latent_in(latent_image)
            extra_args = {"model_options": copy_nested_dicts(self.model_options), "seed": seed}
            wrappers = get_all_wrappers(WrappersMP.SAMPLER_SAMPLE, extra_args["model_options"], is_model_options=True)
            executor = WrapperExecutor.new_class_executor(sampler.sample, sampler, wrappers)
            samples = executor.execute(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
            return self.inner_model.process_latent_out(samples)
        finally:
            self.model_patcher.cleanup()
            self.inner_model = None


def calc_cond_batch(
    model: Any, conds: list[Cond], x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    handler = model_options.get("context_handler")
    if handler is None or not handler.should_use_context(model, conds, x_in, timestep, model_options):
        return _calc_cond_batch_outer(model, conds, x_in, timestep, model_options)
    return handler.execute(_calc_cond_batch_outer, model, conds, x_in, timestep, model_options)


def _calc_cond_batch_outer(
    model: Any, conds: list[Cond], x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    wrappers = get_all_wrappers(WrappersMP.CALC_COND_BATCH, model_options, is_model_options=True)
    return WrapperExecutor.new_executor(_calc_cond_batch, wrappers).execute(model, conds, x_in, timestep, model_options)


def _calc_cond_batch(
    model: Any, conds: list[Cond], x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    """All sides in one forward where 1.5 times its estimate is free, else one after the other."""
    patcher = model.current_patcher
    patcher.prepare_state(timestep, model_options)
    together = [len(conds) * x_in.shape[0], *x_in.shape[1:]]
    batched = model.memory_required(together) * 1.5 < patcher.get_free_memory(patcher.load_device)
    # other lengths of text are not put together (0.33, conds.py, CONDCrossAttn)
    batched = batched and len({cond.text.shape[1] for cond in conds}) == 1
    outputs: list[torch.Tensor] = []
    for group in [range(len(conds))] if batched else [[index] for index in range(len(conds))]:
        sides = [conds[index] for index in group]
        x = torch.cat([x_in] * len(sides))
        text = torch.cat([cond.text.expand(x_in.shape[0], -1, -1) for cond in sides])
        concat = [cond.concat for cond in sides if cond.concat is not None]
        joined = torch.cat(concat) if len(concat) == len(sides) else None
        options = copy_nested_dicts(model_options["transformer_options"])
        options |= {"cond_or_uncond": list(group), "uuids": [cond.uuid for cond in sides], "sigmas": timestep}
        around = model_options.get("model_function_wrapper")
        c = {"c_concat": joined, "c_crossattn": text, "transformer_options": options}
        times = timestep.expand(x.shape[0])
        if around is not None:
            out = around(model.apply_model, {"input": x, "timestep": times, "c": c, "cond_or_uncond": list(group)})
        else:
            out = model.apply_model(x, times, **c)
        outputs.extend(out.chunk(len(sides)))
    return outputs
