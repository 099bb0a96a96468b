"""Two places in ComfyUI's model management: before it loads models, and where it chooses who has to leave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import comfy.model_management as model_management

from .pages import is_dynamic
from .seams import MODEL_LOADS, PINS, SeamTable

logger = logging.getLogger("vram_headroom")

Keys = tuple[int, ...]
"""ids of inner models, which all clones share."""


class HostPlacement:
    """Keeps pinned legacy models out of every eviction, ComfyUI's own ones after an error included, and tells of loads.

    A keep_loaded entry does not protect a dynamic model from comfy-aimdo: those are kept by HostPages.
    """

    def __init__(self, seams: SeamTable) -> None:
        self._pinned: Callable[[], Collection[int]] = frozenset
        self._before_load: list[Callable[[Keys], None]] = []
        self._coming: tuple[Any, ...] = ()
        seams.wrap(PINS, model_management, "free_memory", self._around_free)
        seams.wrap(MODEL_LOADS, model_management, "load_models_gpu", self._around_load)

    def keep_loaded(self, pinned: Callable[[], Collection[int]]) -> None:
        """Ask `pinned` at every eviction which models stay."""
        self._pinned = pinned

    def before_load(self, call: Callable[[Keys], None]) -> None:
        """Call this on the worker thread before ComfyUI brings models to the card."""
        self._before_load.append(call)

    def coming(self) -> tuple[Any, ...]:
        """The inner models that are about to be loaded, while `before_load` tells of them."""
        return self._coming

    def _around_free(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = self._kept()
        if not kept:
            return original(*args, **kwargs)
        # free_memory(memory_required, device, keep_loaded, ...); later releases added arguments behind it
        if len(args) > 2:
            args = (*args[:2], [*args[2], *kept], *args[3:])
        else:
            kwargs = {**kwargs, "keep_loaded": [*kwargs.get("keep_loaded", ()), *kept]}
        return original(*args, **kwargs)

    def _kept(self) -> list[Any]:
        try:
            pinned = self._pinned()
            if not pinned:
                return []
            kept = [entry for entry in list(model_management.current_loaded_models) if _is_pinned(entry, pinned)]
        except Exception:
            logger.exception("pins are left out of account in this eviction")
            return []
        for entry in kept:
            # ComfyUI marks so every model that it looks at here and does not load in the same call
            entry.currently_used = False
        return kept

    def _around_load(self, original: Callable[..., Any], models: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            self._coming = tuple(model.model for model in models if getattr(model, "model", None) is not None)
            keys = tuple(id(model) for model in self._coming)
            for call in self._before_load:
                call(keys)
        except model_management.InterruptProcessingException:
            raise
        except Exception:
            logger.exception("nothing was moved before this load")
        finally:
            self._coming = ()
        return original(models, *args, **kwargs)


def _is_pinned(entry: Any, pinned: Collection[int]) -> bool:
    patcher = entry.model
    return patcher is not None and id(patcher.model) in pinned and not is_dynamic(patcher)
