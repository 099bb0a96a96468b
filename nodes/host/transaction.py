"""What one forward of a model may change, kept so that it can be run again, and where what it may change is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final
from uuid import UUID

import torch

from .pages import is_dynamic

HOLDERS: Final = frozenset(
    {("comfy_extras.nodes_easycache", "EasyCacheHolder"), ("comfy_extras.nodes_easycache", "LazyCacheHolder")}
)
"""Objects in the options of a forward whose attributes, and nothing else, change in it (comfy_extras/nodes_easycache.py, 0.8
and 0.33). EasyCache sets its sum of changes to zero before the forward, so one that only runs again skips the step."""

STATELESS: Final = frozenset({("comfy.context_windows", "IndexListContextWindow")})
"""Objects in the options that no forward of WAN's changes."""

OWN_WRAPPERS: Final = frozenset({("comfy_extras.nodes_easycache", "easycache_forward_wrapper")})
"""Wrappers of the forward whose whole state is in HOLDERS."""

COMPILE_KEY: Final = "torch.compile"
"""The name of ComfyUI's wrapper that puts a compiled module in place (comfy_api/torch_helpers/torch_compile.py)."""

CUDA_GRAPH_MODES: Final = ("reduce-overhead", "max-autotune")
"""Of torch.compile: both record CUDA graphs, whose memory outlives an error. `max-autotune-no-cudagraphs` does not."""

KNOWN_MODELS: Final = frozenset(
    {
        "WAN21",
        "WAN21_CausalAR",
        "WAN21_Vace",
        "WAN21_Camera",
        "WAN21_HuMo",
        "WAN22",
        "WAN22_Animate",
        "WAN_Animate2",
        "WAN22_S2V",
        "WAN21_FlowRVS",
        "WAN21_SCAIL",
        "WAN21_SCAIL2",
        "WAN22_WanDancer",
    }
)
"""Classes of comfy/model_base.py whose forwards (comfy/ldm/wan, 0.8 and 0.33) were read: none writes to the module itself, and
what they write to is in their arguments."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.device, torch.dtype, UUID, type)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)


class Snapshot:
    """Taken before a forward, restored after a failed one: every dictionary, list and set within reach of its arguments, what
    HOLDERS hold, and torch's random number generators.

    Tensors are not copied, but for the few numbers of holders and the input of a forward that a holder may write to. A cache of
    keys and values needs no copy: what lies behind its end is written anew.
    """

    def __init__(self, arguments: object, x: torch.Tensor | None) -> None:
        """`x` is the input that holders write to when they skip a step; None: there is none."""
        self._containers: list[tuple[Any, Any]] = []
        self._holders: list[tuple[Any, dict[str, Any]]] = []
        self._seen: set[int] = set()
        self._keep(arguments)
        self._x = (x, x.clone()) if x is not None and self._holders else None
        self._random = list(_generators(x.device if x is not None else None))

    def restore(self) -> None:
        for container, kept in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(kept)
            else:
                container.update(kept)
        for holder, kept in self._holders:
            vars(holder).clear()
            # a number that is a tensor is added to in place, so each attempt gets its own
            vars(holder).update({name: _own(value) for name, value in kept.items()})
        if self._x is not None:
            self._x[0].copy_(self._x[1])
        for set_state, state in self._random:
            set_state(state)

    def _keep(self, value: Any) -> None:
        if isinstance(value, (dict, list, set, tuple)):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            if not isinstance(value, tuple):
                self._containers.append((value, value.copy()))
            for inner in value.values() if isinstance(value, dict) else value:
                self._keep(inner)
        elif _name(type(value)) in HOLDERS and id(value) not in self._seen:
            self._seen.add(id(value))
            self._holders.append((value, {name: _own(inner) for name, inner in vars(value).items()}))
            for inner in vars(value).values():
                self._keep(inner)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _generators(device: torch.device | None) -> Iterator[tuple[Callable[[Any], object], Any]]:
    """How to set each generator that a forward may draw from, and its state. Reading one waits for nothing on the card."""
    yield torch.set_rng_state, torch.get_rng_state()
    if device is None or device.type == "cpu":
        return
    found = getattr(torch, device.type, None)
    read, write = getattr(found, "get_rng_state", None), getattr(found, "set_rng_state", None)
    if callable(read) and callable(write):
        if device.type == "mps":
            yield write, read()
        else:
            yield (lambda state: write(state, device)), read(device)


def unknown_state(model: Any, arguments: object, options: Mapping[str, Any], own: Callable[[Any], bool]) -> str | None:
    """Why a forward of `model` can't be run again as if nothing had happened; None where it can.

    `arguments` are all it is called with, `options` its transformer_options among them, `own` tells our own wrappers.
    """
    patcher = getattr(model, "current_patcher", None)
    if patcher is None:
        return "the model runs outside of ComfyUI's sampling"
    if type(model).__name__ not in KNOWN_MODELS:
        return f"it is not known what a forward of {type(model).__name__} changes"
    if "multigpu_thread_device" in options or "multigpu_clones" in patcher.model_options:
        return "several cards work on this step"
    if getattr(patcher, "hook_patches", None):
        return "conditioning hooks change the weights during this sampling"
    if getattr(patcher, "injections", None):
        return f"{next(iter(patcher.injections))} changes the model itself"
    if "model_function_wrapper" in patcher.model_options:
        return f"{_told(patcher.model_options['model_function_wrapper'])} stands around the model and may keep state of its own"
    replaced = next((name for name in getattr(patcher, "object_patches", {}) if name.startswith("diffusion_model")), None)
    if replaced is not None:
        return f"{replaced} was replaced by another pack, and may keep state of its own"
    return _compiled(patcher) or _wrapped(options, own) or _patched(options) or _foreign(arguments)


def _compiled(patcher: Any) -> str | None:
    chosen = patcher.model_options.get("torch_compile_kwargs") or {}
    with_graphs = (chosen.get("options") or {}).get("triton.cudagraphs")
    if chosen.get("mode") in CUDA_GRAPH_MODES or with_graphs:
        return f"torch.compile records CUDA graphs (mode {chosen.get('mode')})"
    return None


def _wrapped(options: Mapping[str, Any], own: Callable[[Any], bool]) -> str | None:
    wrappers = options.get("wrappers", {})
    for kind in ("apply_model", "diffusion_model"):
        for key, group in wrappers.get(kind, {}).items():
            for wrapper in group:
                if own(wrapper) or _name(wrapper) in OWN_WRAPPERS or (kind == "apply_model" and key == COMPILE_KEY):
                    continue
                return f"{_told(wrapper)} stands around the model and may keep state of its own"
    return None


def _patched(options: Mapping[str, Any]) -> str | None:
    """Patches of blocks and of the attention: known to keep no state are plain functions that hold nothing that can change."""
    found = [*_leaves(options.get("patches")), *_leaves(options.get("patches_replace"))]
    found += [options["optimized_attention_override"]] if "optimized_attention_override" in options else []
    stateful = next((patch for patch in found if not _holds_nothing(patch)), None)
    return None if stateful is None else f"{_told(stateful)} works inside the model and may keep state of its own"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    elif value is not None:
        yield value


def _holds_nothing(patch: Any, depth: int = 3) -> bool:
    if not isinstance(patch, FunctionType) or not depth:
        return False
    held = [cell.cell_contents for cell in patch.__closure__ or ()] + list(patch.__defaults__ or ())
    return all(isinstance(one, (bool, int, float, str, type(None))) or _holds_nothing(one, depth - 1) for one in held)


def _foreign(arguments: object) -> str | None:
    """An object of a class that nobody here knows may be written to by whoever put it there."""
    waiting, seen = [arguments], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (*_PLAIN, *_FUNCTIONS)):
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            # looked at by `_wrapped`, or called outside of the forward
            waiting += [inner for name, inner in value.items() if name not in ("wrappers", "callbacks")]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [*value]
        elif _name(type(value)) in HOLDERS:
            waiting += [*vars(value).values()]
        elif _name(type(value)) not in STATELESS and not type(value).__module__.startswith(("torch", "numpy")):
            return f"{type(value).__name__} is handed to the model and may keep state of its own"
    return None


def _name(thing: Any) -> tuple[str, str]:
    return str(getattr(thing, "__module__", "")), str(getattr(thing, "__qualname__", ""))


def _told(thing: Any) -> str:
    """A function as a person may find it: its name and the module it is from."""
    function = getattr(thing, "__func__", thing)
    module, name = _name(function if hasattr(function, "__qualname__") else type(thing))
    return f"{name.split('.<locals>')[0]} of {module}"


def is_causal(options: Mapping[str, Any]) -> bool:
    """A model that makes a video block by block, with a cache of what it has made."""
    return "ar_state" in options


def moves_by_itself(model: Any) -> bool:
    """Its weights are paged by comfy-aimdo."""
    return is_dynamic(model.current_patcher)
