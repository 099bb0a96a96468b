"""What the stand-in's nodes do. A node without a behaviour here is described but cannot run."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MODULES = ("loaders", "conditioning", "sampling", "latents", "media", "values")


@dataclass(frozen=True)
class Behaviour:
    run: Callable[..., Any]
    function: str
    """The method's name in ComfyUI, since other packs call it."""
    extras: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Further methods: check_lazy_status, VALIDATE_INPUTS, IS_CHANGED."""


_registered: dict[str, Behaviour] = {}


def node(name: str, function: str = "execute", **extras: Callable[..., Any]) -> Callable[..., Any]:
    """The decorated function is what node `name` does; it gets the inputs and returns the outputs."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        _registered[name] = Behaviour(run, function, extras)
        return run

    return register


def registered() -> dict[str, Behaviour]:
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return _registered
