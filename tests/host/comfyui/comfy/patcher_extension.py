"""Callbacks and wrappers that a patcher carries into sampling, under ComfyUI's names for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CallbacksMP:
    ON_CLONE = "on_clone"
    ON_LOAD = "on_load_after"
    ON_DETACH = "on_detach_after"
    ON_CLEANUP = "on_cleanup"
    ON_PRE_RUN = "on_pre_run"
    ON_PREPARE_STATE = "on_prepare_state"


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


Registry = dict[str, dict[str | None, list[Callable[..., Any]]]]


def copy_nested_dicts(input_dict: dict[Any, Any]) -> dict[Any, Any]:
    return {
        key: copy_nested_dicts(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
        for key, value in input_dict.items()
    }


def merge_nested_dicts(dict1: dict[Any, Any], dict2: dict[Any, Any], copy_dict1: bool = True) -> dict[Any, Any]:
    """`dict2` into `dict1`: dictionaries merge, lists are appended, anything else is replaced."""
    merged = copy_nested_dicts(dict1) if copy_dict1 else dict1
    for key, value in dict2.items():
        if isinstance(value, dict):
            merged[key] = merge_nested_dicts(merged.get(key, {}), value)
        elif isinstance(value, list):
            merged[key] = [*merged.get(key, []), *value]
        else:
            merged[key] = value
    return merged


def get_all_wrappers(
    wrapper_type: str, transformer_options: dict[str, Any] | None, is_model_options: bool = False
) -> list[Callable[..., Any]]:
    options = transformer_options or {}
    if is_model_options:
        options = options.get("transformer_options", {})
    return [one for group in options.get("wrappers", {}).get(wrapper_type, {}).values() for one in group]


class WrapperExecutor:
    """Calls wrappers from the outside in; each gets the executor of what lies beneath it."""

    def __init__(self, original: Callable[..., Any], class_obj: object, wrappers: list[Callable[..., Any]], idx: int) -> None:
        self.original = original
        self.class_obj = class_obj
        self.wrappers = list(wrappers)
        self.idx = idx
        self.is_last = idx == len(wrappers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_last:
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    @classmethod
    def new_executor(cls, original: Callable[..., Any], wrappers: list[Callable[..., Any]], idx: int = 0) -> WrapperExecutor:
        return cls(original, None, wrappers, idx)

    @classmethod
    def new_class_executor(
        cls, original: Callable[..., Any], class_obj: object, wrappers: list[Callable[..., Any]], idx: int = 0
    ) -> WrapperExecutor:
        return cls(original, class_obj, wrappers, idx)
