"""Where a sampler calls the model: a forward that can be run again after an error, and what the sampler had done by then."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import comfy.model_management as model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...vram.recovery import describe, given_up, is_out_of_memory, let_go_of_frames, was_given_up
from .progress import SamplingRun
from .seams import SAMPLING, SeamTable
from .splitting import Call, one_at_a_time
from .transaction import Snapshot, is_causal, moves_by_itself, unknown_state

logger = logging.getLogger("vram_headroom")

KEY: Final = "vram_headroom"
"""Of our wrappers, among those of other packs."""


class Forward:
    """One call of the model, with the arguments and the batch that the sampler gave. Called again, it begins where it began."""

    def __init__(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], own: Callable[[Any], bool]) -> None:
        self._executor = executor
        self._args = args
        self._kwargs = kwargs
        self._own = own
        self._failed = False
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        self._before = Snapshot((args, kwargs), x)

    @property
    def model(self) -> Any:
        """ComfyUI's model object."""
        return self._executor.class_obj

    @property
    def key(self) -> int:
        return id(self.model)

    @property
    def patcher(self) -> Any:
        return self.model.current_patcher

    @property
    def options(self) -> Mapping[str, Any]:
        # apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        found = self._args[5] if len(self._args) > 5 else self._kwargs.get("transformer_options")
        return found if isinstance(found, dict) else {}

    def __call__(self) -> Any:
        """Raises what the model raises."""
        return self._tried(lambda: self._executor(*self._args, **self._kwargs))

    def unknown_state(self) -> str | None:
        """Why it can't be called again; None where it can."""
        return unknown_state(self.model, (self._args, self._kwargs), self.options, self._own)

    @property
    def pages_weights(self) -> bool:
        """Its weights are elastic: freeing other models of that kind gives it nothing."""
        return moves_by_itself(self.model)

    @property
    def can_shrink(self) -> bool:
        """Weights may leave between two calls. Not under torch.compile, where other names stand for the same weights."""
        return not self.pages_weights and not self.patcher.model_options.get("torch_compile_kwargs")

    @property
    def is_patched(self) -> bool:
        """A LoRA is in its weights: streamed, it is added in another precision (comfy/model_patcher.py, LowVramPatch)."""
        return bool(self.patcher.patches)

    def in_turn(self) -> Callable[[], Any] | None:
        """The same work with cond and uncond one after the other; None where that can't be. Not the same to the last bit."""
        if is_causal(self.options) or self._parts() is None:
            return None
        return lambda: self._tried(lambda: torch.cat([self._executor(*args, **kwargs) for args, kwargs in self._parts() or ()]))

    def clean_up(self) -> None:
        """Let go of what the failed call left on the card."""
        _let_go_of_casts(self.model)

    def _parts(self) -> list[Call] | None:
        return one_at_a_time(self._args, self._kwargs, self.options)

    def _tried(self, call: Callable[[], Any]) -> Any:
        if self._failed:
            self._before.restore()
        self._failed = True
        return call()


class Rescuer(Protocol):
    """What is done when memory runs out. Called on the worker thread."""

    def forward(self, forward: Forward) -> Any:
        """What the model answers, however often it had to be called."""
        ...

    def sampling_failed(self, run: SamplingRun, said: str) -> str:
        """What to tell the person of a sampling that memory ended, with `said` as the error's own words."""
        ...


class HostSampling:
    """Puts our wrappers innermost into every sampling: of the model's calls, and of the sampler."""

    def __init__(self, seams: SeamTable) -> None:
        self._rescuer: Rescuer | None = None
        self._runs: list[SamplingRun] = []
        helpers = importlib.import_module("comfy.sampler_helpers")
        seams.wrap(SAMPLING, helpers, "prepare_model_patcher", self._around_prepare)

    def rescue_with(self, rescuer: Rescuer) -> None:
        self._rescuer = rescuer

    def throw_if_interrupted(self) -> None:
        """Raises ComfyUI's own interrupt when a person has stopped the prompt."""
        model_management.throw_exception_if_processing_interrupted()

    def _around_prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # prepare_model_patcher(model, conds, model_options): the wrappers of this sampling are complete when it returns
        result = original(*args, **kwargs)
        options = kwargs.get("model_options", args[2] if len(args) > 2 else None)
        if self._rescuer is not None and isinstance(options, dict):
            self._install(options)
        return result

    def _install(self, model_options: dict[str, Any]) -> None:
        wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        for kind, wrapper in (
            (WrappersMP.APPLY_MODEL, self._around_forward),
            (WrappersMP.PREDICT_NOISE, self._around_prediction),
            (WrappersMP.SAMPLER_SAMPLE, self._around_sampler),
        ):
            group = wrappers.setdefault(kind, {})
            # the last one is the innermost
            group.pop(KEY, None)
            group[KEY] = [wrapper]

    def _is_own(self, wrapper: Any) -> bool:
        return getattr(wrapper, "__self__", None) is self

    def _around_forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rescuer is None or executor.class_obj is None:
            return executor(*args, **kwargs)
        return self._rescuer.forward(Forward(executor, args, kwargs, self._is_own))

    def _around_prediction(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        # predict_noise(x, timestep, model_options, seed)
        if self._runs and len(args) > 1:
            self._runs[-1].saw(args[0], args[1])
        return executor(*args, **kwargs)

    def _around_sampler(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        # sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        if self._rescuer is None or len(args) < 4:
            return executor(*args, **kwargs)
        mask = args[6] if len(args) > 6 else kwargs.get("denoise_mask")
        run = SamplingRun(executor.class_obj, args[0], args[1], (args[2] or {}).get("seed"), mask is not None)
        self._runs.append(run)
        try:
            return executor(*args[:3], run.noting(args[3]), *args[4:], **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error) if was_given_up(error) else describe(error)
            let_go_of_frames(error)
        finally:
            self._runs.remove(run)
        raise given_up(self._rescuer.sampling_failed(run, said))


def _let_go_of_casts(model: Any) -> None:
    """Weights that were fetched ahead of a layer that never ran stay on their module, with their pages pinned, until the node
    has ended (0.33, execution.py:546). A forward that is run again would take them for fresh."""
    prefetch = _module("comfy.model_prefetch")
    clean_queues = getattr(prefetch, "cleanup_prefetch_queues", None)
    clean_modules = getattr(prefetch, "cleanup_prefetched_modules", None)
    if callable(clean_queues):
        clean_queues()
    left = [module for module in model.modules() if hasattr(module, "_prefetch")]
    if left and callable(clean_modules):
        clean_modules(model, left)
    # an error that the card reports late would else meet whoever asks it next (0.33, model_management.py, is_oom)
    discard = getattr(model_management, "discard_cuda_async_error", None)
    if callable(discard) and torch.cuda.is_available():
        discard()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
