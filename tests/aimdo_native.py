"""Runs scenarios of calls on a real comfy-aimdo whose driver is of paper, and prints what it then holds.

    python tests/aimdo_native.py FOLDER < scenarios.json

FOLDER holds the package as `pip install --target` leaves it. Its native library asks CUDA for everything through one table of
functions, `g_cuda`; here they are Python's, on a card that only counts. So the library's own decisions about pages can be seen
without a GPU: tests/test_aimdo_native.py holds the simulation in tests/host to them.

One scenario: `{"card": bytes, "others": bytes, "extra": bytes, "calls": [[name, ...], ...]}`; the answer has a State per call.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

# Slots of AimdoCudaDispatch, the same in 0.4.13 and 0.6.0 (debug data of both libraries).
SLOTS = {
    "error_text": 2,
    "current_device": 3,
    "synchronize": 4,
    "device": 5,
    "attribute": 6,
    "total": 7,
    "name": 8,
    "info": 10,
    "reserve": 21,
    "unreserve": 22,
    "create": 23,
    "map": 24,
    "access": 25,
    "unmap": 26,
    "release": 27,
}
LAST_CHECK = 64
"""Offset of AimdoContext's time of the last look at the driver's free memory, in both."""

P, U64, I64, INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int
OUT64 = ctypes.POINTER(U64)


class State(NamedTuple):
    """After one call: what it returned, and what the library holds."""

    result: Any
    total_usage: int
    free: int
    models: dict[str, tuple[int, list[int]]]
    """Name -> watermark and residency, page by page."""


class PaperDriver:
    """Counts bytes; refuses what does not fit."""

    def __init__(self) -> None:
        self.capacity = self.others = self.used = 0
        self._addresses = itertools.count(2**40, 2**36)
        self._handles = itertools.count(1)
        self._sizes: dict[int, int] = {}
        self.thunks = {
            "error_text": ctypes.CFUNCTYPE(INT, INT, P)(lambda error, text: 1),
            "current_device": ctypes.CFUNCTYPE(INT, ctypes.POINTER(INT))(lambda out: self._answer(out, 0)),
            "synchronize": ctypes.CFUNCTYPE(INT)(lambda: 0),
            "device": ctypes.CFUNCTYPE(INT, ctypes.POINTER(INT), INT)(lambda out, index: self._answer(out, index)),
            "attribute": ctypes.CFUNCTYPE(INT, ctypes.POINTER(INT), INT, INT)(lambda out, what, device: self._answer(out, 0)),
            "total": ctypes.CFUNCTYPE(INT, OUT64, INT)(lambda out, device: self._answer(out, self.capacity)),
            "name": ctypes.CFUNCTYPE(INT, P, INT, INT)(lambda out, length, device: 1),
            "info": ctypes.CFUNCTYPE(INT, OUT64, OUT64)(self._info),
            "reserve": ctypes.CFUNCTYPE(INT, OUT64, U64, U64, U64, U64)(
                lambda out, size, alignment, where, flags: self._answer(out, next(self._addresses))
            ),
            "unreserve": ctypes.CFUNCTYPE(INT, U64, U64)(lambda address, size: 0),
            "create": ctypes.CFUNCTYPE(INT, OUT64, U64, P, U64)(lambda out, size, properties, flags: self.take(out, size)),
            "map": ctypes.CFUNCTYPE(INT, U64, U64, U64, U64, U64)(lambda *_: 0),
            "access": ctypes.CFUNCTYPE(INT, U64, U64, P, U64)(lambda *_: 0),
            "unmap": ctypes.CFUNCTYPE(INT, U64, U64)(lambda *_: 0),
            "release": ctypes.CFUNCTYPE(INT, U64)(self.give_back),
        }
        self.allocate = ctypes.CFUNCTYPE(INT, OUT64, U64, P)(lambda out, size, stream: self.take(out, size))
        self.deallocate = ctypes.CFUNCTYPE(INT, U64, P)(lambda pointer, stream: self.give_back(pointer))

    @property
    def free(self) -> int:
        return max(0, self.capacity - self.others - self.used)

    def install(self, lib: Any) -> None:
        table = (P * 35).in_dll(lib, "g_cuda")
        for name, slot in SLOTS.items():
            table[slot] = ctypes.cast(self.thunks[name], P).value

    def take(self, out: Any, size: int) -> int:
        if size > self.free:
            return OUT_OF_MEMORY
        handle = next(self._handles)
        self._sizes[handle] = size
        self.used += size
        return self._answer(out, handle)

    def give_back(self, handle: int) -> int:
        self.used -= self._sizes.pop(handle)
        return 0

    def _info(self, free: Any, total: Any) -> int:
        free[0], total[0] = self.free, self.capacity
        return 0

    def _answer(self, out: Any, value: int) -> int:
        out[0] = value
        return 0


class Native:
    """One scenario on the real package. Every call finds the driver's free memory read anew."""

    def __init__(self, control: Any, model_vbar: Any, vram_buffer: Any, driver: PaperDriver, scenario: dict[str, Any]) -> None:
        self._control, self._vbars, self._buffers, self._driver = control, model_vbar, vram_buffer, driver
        driver.capacity, driver.others, driver.used = scenario["card"], scenario["others"], 0
        lib = control.lib
        lib.set_simple_vram_headroom(256 << 20)
        if not lib.init((INT * 1)(0), (U64 * 1)(scenario["extra"]), 1):
            raise RuntimeError("init failed")
        control.devctxs = [control.get_devctx(0)]
        self._models: dict[str, Any] = {}
        self._tensors: dict[str, int] = {}
        self._held: dict[str, Any] = {}

    def end(self) -> None:
        self._models.clear()
        self._held.clear()
        self._control.devctxs = []
        self._control.lib.cleanup()

    def call(self, name: str, *arguments: Any) -> State:
        U64.from_address(self._control.devctxs[0] + LAST_CHECK).value = 0
        operation: Callable[..., Any] = getattr(self, f"do_{name}")
        result = operation(*arguments)
        models = {key: (vbar.get_watermark(), vbar.get_residency()) for key, vbar in self._models.items()}
        return State(result, self._control.get_total_vram_usage(), self._driver.free, models)

    def do_new(self, key: str, nbytes: int) -> int:
        self._models[key] = self._vbars.ModelVBAR(nbytes, 0)
        return self._models[key].get_nr_pages()

    def do_drop(self, key: str) -> None:
        del self._models[key]

    def do_fault(self, key: str, offset: int, nbytes: int) -> Any:
        vbar = self._models[key]
        try:
            signature = vbar.fault(vbar.base_addr + offset, nbytes)
        except RuntimeError as error:
            return str(error)
        return None if signature is None else list(signature)

    def do_unpin(self, key: str, offset: int, nbytes: int) -> None:
        self._models[key].unpin(self._models[key].base_addr + offset, nbytes)

    def do_prioritize(self, key: str) -> None:
        self._models[key].prioritize()

    def do_deprioritize(self, key: str) -> None:
        self._models[key].deprioritize()

    def do_limit(self, key: str, nbytes: int) -> None:
        self._models[key].set_watermark_limit(nbytes)

    def do_watermark(self, key: str, nbytes: int) -> None:
        self._models[key].set_watermark(nbytes)

    def do_free(self, key: str, nbytes: int) -> int:
        return self._models[key].free_memory(nbytes)

    def do_reset(self) -> None:
        self._vbars.vbars_reset_watermark_limits()

    def do_analyze(self) -> int:
        return self._vbars.vbars_analyze()

    def do_headroom(self, nbytes: int) -> None:
        self._control.lib.set_simple_vram_headroom(nbytes)

    def do_others(self, nbytes: int) -> None:
        self._driver.others = nbytes

    def do_tensor(self, key: str, nbytes: int) -> bool:
        pointer = U64(0)
        allocate = self._control.lib.aimdo_cuda_malloc_async
        failed = allocate(ctypes.byref(pointer), U64(nbytes), None, self._driver.allocate)
        if not failed:
            self._tensors[key] = pointer.value
        return not failed

    def do_untensor(self, key: str) -> None:
        if key in self._tensors:
            self._control.lib.aimdo_cuda_free_async(U64(self._tensors.pop(key)), None, self._driver.deallocate)

    def do_buffer(self, key: str, nbytes: int) -> bool:
        if key not in self._held:
            self._held[key] = self._buffers.VRAMBuffer(1 << 30, 0)
        try:
            self._held[key].get(nbytes)
        except RuntimeError:
            return False
        return True

    def do_unbuffer(self, key: str) -> None:
        del self._held[key]


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    control = importlib.import_module("comfy_aimdo.control")
    if not control.init("cuda"):
        raise SystemExit("the library does not load here")
    control.set_log_none()
    # They look at control.lib when they are imported.
    model_vbar = importlib.import_module("comfy_aimdo.model_vbar")
    vram_buffer = importlib.import_module("comfy_aimdo.vram_buffer")
    driver = PaperDriver()
    driver.install(control.lib)
    answers: list[list[State]] = []
    for scenario in json.load(sys.stdin):
        native = Native(control, model_vbar, vram_buffer, driver, scenario)
        answers.append([native.call(*call) for call in scenario["calls"]])
        native.end()
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
