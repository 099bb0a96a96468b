"""Memory that ComfyUI can be asked for after an error: other models leave through its own `free_memory`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import comfy.model_management as model_management

from .handle import ComfyModelHandle, LoadedList
from .pages import is_dynamic

ALL: Final = 1e32
"""More than any card has: what ComfyUI itself asks for where everything is to leave."""


def free_others(stay: Collection[int], device: Any, models: LoadedList) -> int:
    """Send off `device` every model but those in `stay`, by key, and those that are pinned. Returns the bytes freed.

    Elastic ones stay: their pages were evicted before the allocation failed. Worker thread only.
    """
    entries = [entry for entry in list(model_management.current_loaded_models) if entry.model is not None]
    kept = [entry for entry in entries if id(entry.model.model) in stay or is_dynamic(entry.model)]
    leaving = [entry.model for entry in entries if not any(entry is one for one in kept) and entry.device == device]
    before = sum(int(patcher.loaded_size()) for patcher in leaving)
    if before:
        model_management.free_memory(ALL, device, keep_loaded=kept)
        models.publish()
    return max(0, before - sum(int(patcher.loaded_size()) for patcher in leaving))


def halve(patcher: Any, models: LoadedList) -> int:
    """Send half of what a legacy model has on its card off it; the rest of its weights then streams. Returns bytes freed."""
    handle = ComfyModelHandle(patcher, models)
    there = int(patcher.loaded_size())
    return 0 if is_dynamic(patcher) or there <= 0 else handle.unload((there + 1) // 2)
