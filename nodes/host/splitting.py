"""A call of the model for cond and uncond together, taken apart into one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]


def one_at_a_time(args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> list[Call] | None:
    """The calls that together do what apply_model(*args, **kwargs) does, as ComfyUI makes them where both do not fit at once.

    None where it is one already, or where something is handed over whose parts can't be told.
    """
    sides = options.get("cond_or_uncond")
    if not isinstance(sides, list) or len(sides) < 2 or not args or not isinstance(args[0], torch.Tensor):
        return None
    batch, each = args[0].shape[0], args[0].shape[0] // len(sides)
    # of a ControlNet's answer nobody says which part belongs to which side
    if each * len(sides) != batch or (len(args) > 4 and args[4] is not None) or kwargs.get("control") is not None:
        return None

    def part(value: Any, index: int) -> Any:
        if value is options:
            found = {**options, "cond_or_uncond": [sides[index]]}
            uuids = options.get("uuids")
            return {**found, "uuids": [uuids[index]]} if isinstance(uuids, list) and len(uuids) == len(sides) else found
        if isinstance(value, torch.Tensor):
            return value[index * each : (index + 1) * each] if value.ndim and value.shape[0] == batch else value
        if isinstance(value, list) and value and all(isinstance(inner, torch.Tensor) for inner in value):
            return [part(inner, index) for inner in value]
        return value

    return [
        (tuple(part(value, index) for value in args), {name: part(value, index) for name, value in kwargs.items()})
        for index in range(len(sides))
    ]
