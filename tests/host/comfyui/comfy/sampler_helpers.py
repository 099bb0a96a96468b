"""Loading what a sampling run needs, in ComfyUI's two calls."""

from typing import Any

from . import model_management
from .model_patcher import ModelPatcher
from .patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers, merge_nested_dicts


def prepare_model_patcher(model: ModelPatcher, conds: dict[str, Any], model_options: dict[str, Any]) -> None:
    """The patcher's wrappers and callbacks become those of this run."""
    options = model_options.setdefault("transformer_options", {})
    options["wrappers"] = merge_nested_dicts(options.get("wrappers", {}), model.wrappers)
    options["callbacks"] = merge_nested_dicts(options.get("callbacks", {}), model.callbacks)


def prepare_sampling(
    model: ModelPatcher,
    noise_shape: Any,
    conds: dict[str, Any],
    model_options: dict[str, Any] | None = None,
    force_full_load: bool = False,
    force_offload: bool = False,
) -> tuple[Any, dict[str, Any], list[ModelPatcher]]:
    executor = WrapperExecutor.new_executor(
        _prepare_sampling, get_all_wrappers(WrappersMP.PREPARE_SAMPLING, model_options, is_model_options=True)
    )
    return executor.execute(model, noise_shape, conds, model_options=model_options, force_full_load=force_full_load)


def _prepare_sampling(
    model: ModelPatcher,
    noise_shape: Any,
    conds: dict[str, Any],
    model_options: dict[str, Any] | None = None,
    force_full_load: bool = False,
) -> tuple[Any, dict[str, Any], list[ModelPatcher]]:
    additional = model.get_nested_additional_models()
    batch, rest = noise_shape[0], list(noise_shape[1:])
    # Twice the batch is what ComfyUI makes room for, once is what it must have: cond and uncond together or in turn.
    model_management.load_models_gpu(
        [model, *additional],
        memory_required=model.model.memory_required([batch * 2, *rest]),
        minimum_memory_required=model.model.memory_required([batch, *rest]),
        force_full_load=force_full_load,
    )
    return model.model, conds, additional
