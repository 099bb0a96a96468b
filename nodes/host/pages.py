"""comfy-aimdo, which pages the weights of DynamicVRAM models: its counters and watermarks, where this ComfyUI has it.

Read on the worker thread only, but for the process's total: model-vbar.c has no locks.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, Final

from .seams import PAGES, SeamTable

logger = logging.getLogger("vram_headroom")

DEFAULT_HEADROOM: Final = 256 << 20
"""Pages are dropped below this much free memory (comfy-aimdo 0.4.13, plat.h VRAM_HEADROOM; a larger one can be set)."""


def dynamic_vram_is_on() -> bool:
    try:
        found = importlib.import_module("comfy.memory_management")
    except ImportError:
        return False
    return bool(getattr(found, "aimdo_enabled", False))


def is_dynamic(patcher: Any) -> bool:
    """A DynamicVRAM patcher; releases before it have no such question to ask."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if callable(ask) else False


class HostPages:
    """What comfy-aimdo tells and takes. Every name is looked for; what is absent answers None or False."""

    def __init__(self, seams: SeamTable) -> None:
        self._control = _module("comfy_aimdo.control") if dynamic_vram_is_on() else None
        if dynamic_vram_is_on():
            self._on = seams.note(PAGES, live=callable(getattr(self._control, "get_total_vram_usage", None)))
        else:
            self._on = False

    def used_by_process(self) -> int | None:
        """Bytes this process holds on its cards: torch's, pages and buffers. None where that is not counted."""
        ask: Callable[[], int] | None = getattr(self._control, "get_total_vram_usage", None)
        if not self._on or ask is None:
            return None
        try:
            return int(ask())
        except (RuntimeError, AttributeError, OSError):
            logger.debug("comfy-aimdo does not say what it holds", exc_info=True)
            return None

    def headroom(self) -> int:
        """Bytes that its budget keeps free: a getter since 0.6.0, before only the floor is known."""
        ask: Callable[[], int] | None = getattr(self._control, "get_simple_vram_headroom", None)
        try:
            return max(DEFAULT_HEADROOM, int(ask())) if callable(ask) else DEFAULT_HEADROOM
        except (RuntimeError, AttributeError, OSError):
            return DEFAULT_HEADROOM

    def keep(self, patcher: Any, nbytes: int) -> bool:
        """Let this model's first `nbytes` bytes of pages stay until the node has ended, when ComfyUI resets all such limits.

        False where it has no pages, or no such limit.
        """
        pages = _pages_of(patcher)
        limit = getattr(pages, "set_watermark_limit", None)
        if not self._on or not callable(limit):
            return False
        limit(int(nbytes))
        return True


def _pages_of(dynamic: Any) -> Any:
    find = getattr(dynamic, "_vbar_get", None)
    return find() if callable(find) else None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:
        # absent, or a library that can't be loaded here
        logger.debug("%s can't be imported", name, exc_info=True)
        return None
