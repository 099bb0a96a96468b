"""One model on the card, and what ComfyUI's legacy patcher does to it: load in part, unload in part, exchange patches.

Read in ComfyUI 0.8 and 0.33, comfy/model_patcher.py (load, partially_load, partially_unload), which count alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil, inf
from typing import Final

from .modules import Module

Key = tuple[str, str, str]
"""ModelRef.key: path, role, load options."""

EVERYTHING: Final = inf
"""A budget without limit."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A model as the host has it. `loaded` is what ComfyUI counts: what is on the card unless the model `stays`."""

    key: Key
    name: str
    size: int
    loaded: int = 0
    modules: tuple[Module, ...] = field(default=(), compare=False)
    """In load order; none: weights are taken to be divisible at will."""
    on: bytes = b""
    """For each module, whether it was placed on the card."""
    partly: bool = False
    """ComfyUI's model_lowvram: weights were left off, so another load may add to them."""
    buffer: float = 0
    """Bytes for weights that stream: the largest module that does with those fetched ahead."""
    patches: str | None = None
    """The LoRAs on its weights; None: not known, any will do."""
    elastic: bool = False
    pinned: bool = False
    stays: bool = False
    """Has nowhere to go: unloading it frees nothing."""
    listed: bool = True
    """In ComfyUI's list of loaded models."""

    @property
    def on_card(self) -> int:
        return self.size if self.stays else self.loaded


def with_modules(model: Placed, modules: tuple[Module, ...]) -> Placed:
    """The model, its modules known. What of them is on the card is guessed from the bytes: first those that load first."""
    if model.modules == modules:
        return model
    left, on = model.loaded, bytearray(len(modules))
    for index, module in enumerate(modules):
        if module.bytes <= left:
            on[index] = 1
            left -= module.bytes
    return replace(model, modules=modules, on=bytes(on))


def emptied(model: Placed) -> Placed:
    """All weights off the card, and no patches on them."""
    return replace(model, loaded=0, on=bytes(len(model.modules)), partly=False, buffer=0, patches=None)


def loaded_more(model: Placed, extra: float, patches: str, streams: int) -> Placed:
    """`extra` bytes more room for its weights than it has now, or less if below zero (ModelPatcher.partially_load)."""
    exchange = model.patches is not None and model.patches != patches
    if exchange:
        extra += model.loaded
        model = emptied(model)
    elif extra < 0:
        return shrunk(model, -extra, streams)
    if model.loaded and not model.partly:
        return model
    budget = model.loaded + extra
    if budget > model.size:
        # what no module holds itself comes along too
        return replace(model, loaded=model.size, on=b"\1" * len(model.modules), partly=False, buffer=0, patches=patches)
    return replace(_filled(model, budget, streams), patches=patches)


def _filled(model: Placed, budget: float, streams: int) -> Placed:
    """As many modules as fit, each leaving room for those that will stream (ModelPatcher.load)."""
    modules = model.modules
    if not modules:
        loaded = max(0, min(model.size, int(budget)))
        return replace(model, loaded=loaded, partly=loaded < model.size)
    # up to and with each, and the whole again for those that would be fetched after the last
    sums = [*accumulate(module.bytes for module in modules)]
    sums += sums[-1:] * streams
    on, loaded, buffer, partly = bytearray(model.on), 0, 0, False
    for index, module in enumerate(modules):
        ahead = module.streaming + sums[index + streams] - sums[index]
        needed = ahead if ahead > buffer else buffer
        if loaded + module.bytes + needed < budget:
            loaded += module.bytes
            on[index] = 1
        else:
            # what ComfyUI can't cast stays where it is, and is not counted as left off
            buffer = needed
            partly = partly or module.castable
    return replace(model, loaded=loaded, on=bytes(on), partly=partly, buffer=buffer)


def shrunk(model: Placed, wanted: float, streams: int) -> Placed:
    """`wanted` bytes of it off the card, from the end of the load order (ModelPatcher.partially_unload).

    May free less than wanted, when modules it does not load by themselves are all that is left, or when what streams needs a
    larger buffer than before.
    """
    modules = model.modules
    if not modules:
        return replace(model, loaded=max(0, model.loaded - ceil(wanted)), partly=True)
    on, freed, buffer = bytearray(model.on), 0, model.buffer
    window = [min(buffer / (streams + 1), modules[-1].bytes)] * streams
    for index in range(len(modules) - 1, -1, -1):
        if wanted + buffer - model.buffer < freed:
            break
        if on[index]:
            module = modules[index]
            on[index] = 0
            freed += module.bytes
            buffer = max(buffer, module.streaming + sum(window))
            window = [*window[1:], module.bytes] if streams else window
    return replace(model, loaded=model.loaded - freed, on=bytes(on), partly=True, buffer=buffer)


def unloaded(model: Placed, wanted: float, streams: int) -> Placed:
    """What a request for `wanted` bytes leaves of it: part if that suffices, else nothing (LoadedModel.model_unload)."""
    if wanted < model.loaded:
        part = shrunk(model, wanted, streams)
        if model.loaded - part.loaded >= wanted:
            return part
    return replace(emptied(model), listed=False)
