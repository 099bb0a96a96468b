"""A model's range of addresses on the card, in pages that come when they are used and go under pressure."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter
from typing import Any

from standin.pages import PAGE_BYTES, PagesOfAModelError

from . import control

_addresses = itertools.count(2**40, 2**40)

callers: Counter[tuple[str, str]] = Counter()
"""(method, thread) -> calls. Of the stand-in only: the real library has no locks, so none but the worker may call it."""


def _note(method: str) -> None:
    callers[method, threading.current_thread().name] += 1


class ModelVBAR:
    def __init__(self, size: int, device: int) -> None:
        self._devctx = control.get_devctx(device)
        self._vbar = self._devctx.reserve(int(size))
        self.device = device
        self.max_size = size
        self.offset = 0
        self.base_addr = next(_addresses)

    def prioritize(self, malloc_async_clamp: int | None = None) -> None:
        """The clamp (0.4.13) is not simulated; ComfyUI 0.33 passes none."""
        _note("prioritize")
        self._devctx.prioritize(self._vbar)

    def deprioritize(self) -> None:
        _note("deprioritize")
        self._devctx.deprioritize(self._vbar)

    def alloc(self, num_bytes: int) -> tuple[ModelVBAR, int, int]:
        """(this, address, bytes); addresses are multiples of 512."""
        self.offset = (self.offset + 511) & ~511
        if self.offset + num_bytes > self.max_size:
            raise MemoryError("VBAR OOM")
        address = self.base_addr + self.offset
        self.offset += num_bytes
        return self, address, num_bytes

    def fault(self, alloc: int, size: int) -> Any:
        """A signature that changes when a page of it has been away; None: no page, stream it."""
        _note("fault")
        try:
            serials = self._devctx.fault(self._vbar, alloc - self.base_addr, size)
        except PagesOfAModelError as error:
            raise RuntimeError(f"Fault failed: {error.code}") from error
        if serials is None:
            return None
        return (ctypes.c_uint32 * (size // PAGE_BYTES + 2))(*serials)

    def unpin(self, alloc: int, size: int) -> None:
        _note("unpin")
        self._devctx.unpin(self._vbar, alloc - self.base_addr, size)

    def loaded_size(self) -> int:
        _note("loaded_size")
        return self._vbar.resident_bytes

    def set_watermark_limit(self, size_bytes: int) -> None:
        _note("set_watermark_limit")
        self._devctx.set_watermark_limit(self._vbar, size_bytes)

    def set_watermark(self, size_bytes: int) -> None:
        _note("set_watermark")
        self._devctx.set_watermark(self._vbar, size_bytes)

    def free_memory(self, size_bytes: float) -> int:
        _note("free_memory")
        return self._devctx.free(self._vbar, int(size_bytes))

    def get_nr_pages(self) -> int:
        _note("get_nr_pages")
        return len(self._vbar.pages)

    def get_watermark(self) -> int:
        """In pages."""
        _note("get_watermark")
        return self._vbar.watermark

    def get_residency(self) -> list[int]:
        """Per page: 1 resident, 2 pinned, added."""
        _note("get_residency")
        return self._vbar.residency()

    def __del__(self) -> None:
        if hasattr(self, "_vbar"):
            self._devctx.forget(self._vbar)
            del self._vbar


def vbar_fault(alloc: tuple[ModelVBAR, int, int]) -> Any:
    return alloc[0].fault(*alloc[1:])


def vbar_unpin(alloc: tuple[ModelVBAR, int, int] | None) -> None:
    if alloc is not None:
        alloc[0].unpin(*alloc[1:])


def vbar_signature_compare(a: Any, b: Any) -> bool:
    """Raises ValueError for signatures of different layers, which differ in length."""
    if a is None or b is None:
        return False
    if len(a) != len(b):
        raise ValueError(f"signatures of {len(a)} and {len(b)} pages are not of one layer")
    return bytes(a) == bytes(b)


def vbars_reset_watermark_limits() -> None:
    _note("vbars_reset_watermark_limits")
    for devctx in control.devctxs:
        devctx.reset_watermark_limits()


def vbars_analyze(device: int | None = None) -> int:
    """Bytes of all models' pages on one card, the first by default."""
    _note("vbars_analyze")
    if control.lib is None or not control.devctxs:
        return 0
    return (control.devctxs[0] if device is None else control.get_devctx(device)).resident_bytes
