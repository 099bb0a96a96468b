"""The process-wide side of comfy-aimdo: starting it, its cards, total and headroom. `lib` stands for the native library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from standin import settings
from standin.card import pages
from standin.pages import CardPages

from . import NEWER

lib: Library | None = None
devctxs: list[CardPages] = []


class Library:
    """The native functions that are called by name: `control.lib.set_simple_vram_headroom` before 0.6.0."""

    def __init__(self) -> None:
        self._cards: dict[int, CardPages] = {}
        self._headroom: int | None = None
        if _has("control.get_simple_vram_headroom"):
            self.get_simple_vram_headroom = self._get_simple_vram_headroom

    def set_simple_vram_headroom(self, nbytes: int) -> None:
        """Takes effect at the next fault or allocation; lowering it below 256 MiB changes nothing, since the polled reading
        keeps that floor. (plat.h:150-160; 0.6.0, control.py:215-229)"""
        self._headroom = int(nbytes)
        for card in self._cards.values():
            card.simple_headroom = self._headroom

    def _get_simple_vram_headroom(self) -> int:
        return next(iter(self._cards.values())).simple_headroom

    def set_nvml_pressure(self, wanted: bool) -> None:
        """Accepted; NVML's reading is not simulated."""

    def get_devctx(self, device_id: int) -> CardPages | None:
        return self._cards.get(device_id)

    def get_total_vram_usage(self, devctx: CardPages) -> int:
        return devctx.total_usage

    def init(self, device_ids: list[int], headrooms: list[int]) -> bool:
        """control.c:208-252: once, and only cards that are there."""
        card = pages()
        if self._cards or card is None or device_ids != [0]:
            return False
        card.extra_headroom = headrooms[0]
        self._cards[0] = card
        if self._headroom is not None:
            self.set_simple_vram_headroom(self._headroom)
        return True


def _has(name: str) -> bool:
    """Whether the release that is played has this name."""
    return _number(settings.current().aimdo) >= _number(NEWER[name])


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def detect_vendor() -> str | None:
    return "cuda" if settings.current().vram_bytes else None


def init(implementation: str | None = None, simple_vram_headroom: int | None = None, nvml_pressure: bool = False) -> bool:
    global lib
    lib = lib or Library()
    if simple_vram_headroom is not None:
        lib.set_simple_vram_headroom(int(simple_vram_headroom))
    lib.set_nvml_pressure(bool(nvml_pressure))
    return True


def init_devices(device_ids: Iterable[Any]) -> bool:
    global devctxs
    if lib is None:
        return False
    wanted = [one if isinstance(one, tuple) else (one, 0) for one in device_ids]
    if any(headroom < 0 for _, headroom in wanted):
        raise ValueError("extra_vram_headroom must be non-negative")
    if not lib.init([int(index) for index, _ in wanted], [int(headroom) for _, headroom in wanted]):
        devctxs = []
        return False
    devctxs = [get_devctx(index) for index, _ in wanted]
    return True


def init_device(device_id: Any, extra_vram_headroom: int = 0) -> bool:
    return init_devices([(device_id, extra_vram_headroom) if extra_vram_headroom else device_id])


def get_devctx(device_id: int) -> CardPages:
    found = None if lib is None else lib.get_devctx(int(device_id))
    if found is None:
        raise RuntimeError(f"comfy-aimdo device {device_id} is not initialized")
    return found


def deinit() -> None:
    global lib, devctxs
    lib, devctxs = None, []


def analyze() -> None: ...


def get_total_vram_usage() -> int:
    """Bytes on all cards: models' pages, buffers, and what torch allocated while the hooks were in."""
    if lib is None:
        return 0
    return sum(lib.get_total_vram_usage(devctx) for devctx in devctxs)


def set_log_none() -> None: ...
def set_log_critical() -> None: ...
def set_log_error() -> None: ...
def set_log_warning() -> None: ...
def set_log_info() -> None: ...
def set_log_debug() -> None: ...


if _has("control.set_simple_vram_headroom"):

    def set_simple_vram_headroom(headroom: int) -> None:
        headroom = int(headroom)
        if headroom < 0 or headroom > (1 << 60):
            raise ValueError("simple_vram_headroom must be between 0 and 2**60 bytes")
        if lib is None:
            raise RuntimeError("comfy-aimdo is not initialized")
        lib.set_simple_vram_headroom(headroom)

    def get_simple_vram_headroom() -> int:
        if lib is None:
            raise RuntimeError("comfy-aimdo is not initialized")
        return lib.get_simple_vram_headroom()
