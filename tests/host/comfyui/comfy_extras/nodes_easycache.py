"""Caches that leave out steps which would change little: the state they keep, and when they change it, as in ComfyUI 0.33."""

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, copy_nested_dicts


class EasyCacheHolder:
    """What is known of the steps before."""

    def __init__(self, reuse_threshold: float) -> None:
        self.reuse_threshold = reuse_threshold
        self.cumulative_change_rate: Any = 0.0
        self.initial_step = True
        self.skip_current_step = False
        self.first_cond_uuid: Any = None
        self.x_prev: torch.Tensor | None = None
        self.output_prev: torch.Tensor | None = None
        self.rate: torch.Tensor | None = None
        self.uuid_cache_diffs: dict[Any, torch.Tensor] = {}
        self.output_change_rates: list[torch.Tensor] = []
        self.total_steps_skipped = 0

    def clone(self) -> Any:
        return type(self)(self.reuse_threshold)

    def may_skip(self, x: torch.Tensor) -> bool:
        """Adds this step's change to the sum, in place; a step that is not left out sets it to zero before it is computed."""
        if self.x_prev is None or self.output_prev is None or self.rate is None:
            return False
        self.cumulative_change_rate += self.rate * (x - self.x_prev).abs().mean() / self.output_prev.abs().mean()
        if self.cumulative_change_rate < self.reuse_threshold:
            return True
        self.cumulative_change_rate = torch.zeros(())
        return False

    def learn(self, x: torch.Tensor, output: torch.Tensor) -> None:
        if self.x_prev is not None and self.output_prev is not None:
            changed = (output - self.output_prev).abs().mean()
            self.output_change_rates.append(changed)
            self.rate = changed / (x - self.x_prev).abs().mean()
        self.x_prev, self.output_prev = x.clone(), output.clone()


class LazyCacheHolder(EasyCacheHolder):
    """The same for whole predictions."""


def easycache_forward_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the diffusion model."""
    x, options = args[0], args[3]
    holder, uuids = options["easycache"], options["uuids"]
    if holder.initial_step:
        holder.first_cond_uuid, holder.initial_step = uuids[0], False
    first = holder.first_cond_uuid in uuids
    known = all(one in holder.uuid_cache_diffs for one in uuids)
    batch = x.shape[0] // len(uuids)
    if first and known and holder.may_skip(x[:batch]):
        holder.skip_current_step = True
        holder.total_steps_skipped += 1
    if holder.skip_current_step and known:
        for index, one in enumerate(uuids):
            x[index * batch : (index + 1) * batch, : holder.uuid_cache_diffs[one].shape[1]] += holder.uuid_cache_diffs[one]
        return x[:, : next(iter(holder.uuid_cache_diffs.values())).shape[1]]
    before = x.clone()
    output = executor(*args, **kwargs)
    for index, one in enumerate(uuids):
        part = slice(index * batch, (index + 1) * batch)
        holder.uuid_cache_diffs[one] = output[part] - before[part, : output.shape[1]]
    if first:
        holder.learn(before[:batch], output[:batch])
    return output


def easycache_calc_cond_batch_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    args[-1]["transformer_options"]["easycache"].skip_current_step = False
    return executor(*args, **kwargs)


def lazycache_predict_noise_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    x, holder = args[0], args[2]["transformer_options"]["easycache"]
    if "all" in holder.uuid_cache_diffs and holder.may_skip(x):
        holder.total_steps_skipped += 1
        return x + holder.uuid_cache_diffs["all"]
    output = executor(*args, **kwargs)
    holder.uuid_cache_diffs["all"] = output - x
    holder.learn(x, output)
    return output


def easycache_sample_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Each sampling begins with a holder of its own."""
    guider = executor.class_obj
    before = guider.model_options
    guider.model_options = copy_nested_dicts(before)
    options = guider.model_options["transformer_options"]
    options["easycache"] = options["easycache"].clone()
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = before


def with_easycache(model: ModelPatcher, reuse_threshold: float) -> ModelPatcher:
    model = model.clone()
    model.model_options["transformer_options"]["easycache"] = EasyCacheHolder(reuse_threshold)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "easycache", easycache_sample_wrapper)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "easycache", easycache_calc_cond_batch_wrapper)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "easycache", easycache_forward_wrapper)
    return model


def with_lazycache(model: ModelPatcher, reuse_threshold: float) -> ModelPatcher:
    model = model.clone()
    model.model_options["transformer_options"]["easycache"] = LazyCacheHolder(reuse_threshold)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "lazycache", easycache_sample_wrapper)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "lazycache", lazycache_predict_noise_wrapper)
    return model
