"""What to do after an out-of-memory error: free a little, try again; free more, try again; then say what was tried.

The ladder is a pure state machine. What a rung frees, and what is tried again, are the caller's.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

import torch

from .units import say_gib

T = TypeVar("T")

MAX_RETRIES: Final = 3
"""Consecutive retries. After three, the same work would most likely only fail a fourth time, later."""

CUDA_OUT_OF_MEMORY: Final = 2
"""`cudaErrorMemoryAllocation` in CUDA's driver_types.h, and `hipErrorOutOfMemory` in ROCm's hip_runtime_api.h: both 2."""

OutOfMemoryError: Final[type[RuntimeError]] = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError
"""torch 2.5 gave it its short name; before, it is only `torch.cuda.OutOfMemoryError`. All backends raise the same class."""

_AcceleratorError: Final[type[RuntimeError] | None] = getattr(torch, "AcceleratorError", None)
"""Since torch 2.8: an error that the card reports late, with the driver's number in `error_code`."""

_TEXTS: Final = (
    # c10/cuda/CUDACachingAllocator.cpp before torch 1.13, when it was a plain RuntimeError; on ROCm its CUDA reads HIP.
    r"(?:CUDA|HIP) out of memory",
    # c10/cuda/CUDAException.cpp before torch 2.8 (the driver's own words, outside the caching allocator).
    r"(?:CUDA|HIP) error: out of memory",
    r"cudaErrorMemoryAllocation|hipErrorOutOfMemory",
    # c10/xpu/XPUCachingAllocator.cpp; and SYCL's own words, when a kernel and not the allocator meets the limit.
    r"XPU out of memory|UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    # aten/src/ATen/mps/MPSAllocator.mm: a plain RuntimeError in every release.
    r"MPS backend out of memory",
    # torch_npu's NPUCachingAllocator.cpp, on Ascend.
    r"NPU out of memory",
    # aten/src/ATen/cuda/Exceptions.h: the libraries' own allocations (handles, workspaces), outside torch's allocator.
    r"(?:CUBLAS|HIPBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    # c10/core/impl/alloc_cpu.cpp, on Linux and macOS.
    r"DefaultCPUAllocator: can't allocate memory",
    # The same file on Windows (`DefaultCPUAllocator: not enough memory`), oneMKL, and torch-directml with its two words more.
    r"[Nn]ot enough (?:GPU video )?memory",
    # comfy_aimdo/vram_buffer.py (comfy-aimdo 0.4.13): address space, then pages of the buffer that weights stream through.
    r"VRAM reservation failed",
    r"VRAM grow failed",
    # comfy_aimdo/model_vbar.py: VBAR_FAULT_ERROR (1, no room, raises nothing: there ComfyUI streams the weight). In the one
    # report read (ComfyUI #15269) it follows "VRAM Allocation failed (non OOM)", so a retry may not help.
    r"Fault failed: 2\b",
)
_OUT_OF_MEMORY_TEXT: Final = re.compile("|".join(_TEXTS))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a card or on the host. An interrupt never says so, whatever its text."""
    if not isinstance(error, Exception):
        return False
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    if _AcceleratorError is not None and isinstance(error, _AcceleratorError):
        code = getattr(error, "error_code", None)
        if code is not None:
            return code == CUDA_OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY_TEXT.search(str(error)) is not None


def given_up(message: str) -> RuntimeError:
    """An OutOfMemoryError to raise where everything was tried: whoever is further out need not begin again."""
    error = OutOfMemoryError(message)
    error.__dict__["vram_headroom_gave_up"] = True
    return error


def was_given_up(error: BaseException) -> bool:
    """Whether it is one of `given_up`."""
    return bool(getattr(error, "vram_headroom_gave_up", False))


class Rung(IntEnum):
    """What to give up, the cheapest to bring back first. Each frees more than the one before."""

    CACHE = 1
    """What the allocator keeps for later, and garbage: costs nothing to give back."""
    IDLE_PIPELINES = 2
    """Models that nothing running needs."""
    TEXT_ENCODER = 3
    """Its work is done once the prompt is encoded."""
    PART_OF_GENERATOR = 4
    """The rest of the weights streams: slower steps."""
    PINS = 5
    """What a policy keeps on the card at all times."""

    @property
    def words(self) -> str:
        return {
            Rung.CACHE: "allocator cache",
            Rung.IDLE_PIPELINES: "idle pipelines",
            Rung.TEXT_ENCODER: "text encoder",
            Rung.PART_OF_GENERATOR: "part of the generator",
            Rung.PINS: "pinned components",
        }[self]


@dataclass(frozen=True, slots=True)
class Ladder:
    """How far up one operation is: the retries it had in a row, and the rung that made the last one possible."""

    retries: int = 0
    rung: Rung | None = None

    @property
    def exhausted(self) -> bool:
        """Nothing above, or no retry left."""
        return not self.climbs()

    def climbs(self) -> tuple[Rung, ...]:
        """The rungs still to try, lowest first; none once the retries are used up."""
        if self.retries >= MAX_RETRIES:
            return ()
        return tuple(rung for rung in Rung if self.rung is None or rung > self.rung)

    def after_failure(self, freed_rung: Rung) -> Ladder:
        """Memory ran out, `freed_rung` freed something, and the operation is about to be tried again."""
        if freed_rung not in self.climbs():
            raise ValueError(f"{freed_rung.name} is not above {self}")
        return Ladder(self.retries + 1, freed_rung)

    def after_success(self) -> Ladder:
        """Back to the start: only failures in a row count."""
        return Ladder()


def run_with_recovery(
    operation: Callable[[], T],
    free: Callable[[Rung], int],
    on_retry: Callable[[Rung, int], None] | None = None,
    last_resort: Callable[[], Callable[[], T] | None] | None = None,
    refuse: Callable[[], str | None] | None = None,
) -> T:
    """Run `operation`; when memory runs out, climb until `free(rung)` says it freed bytes, and run it again.

    A rung that frees nothing costs no retry. `on_retry(rung, freed)` is told before each retry. Asked once memory has run out:
    `refuse` says why there must be no retry; `last_resort` returns what does the same work with less memory, at a price, if
    anything does: the last retry, when no rung is left that frees, or no other retry. When nothing is left to free, or the
    retries are used up, an OutOfMemoryError (`was_given_up`) says what failed and what was tried. Every other error, and every
    interrupt, passes as it is; so does whatever `free`, `on_retry` and `refuse` raise.
    """
    ladder = Ladder()
    tried: list[tuple[Rung, int]] = []
    handled_by_caller = sys.exc_info()[1]
    work, smaller, asked = operation, None, False
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error) or was_given_up(error):
                raise
            said = describe(error)
            let_go_of_frames(error, handled_by_caller)
        # Outside the except block: as long as Python handles the error, its frames keep the tensors that filled the card.
        if not asked:
            asked = True
            refusal = refuse() if refuse is not None else None
            if refusal is not None:
                raise given_up(f"{said}\nNot tried again: {refusal}.")
            smaller = last_resort() if last_resort is not None else None
        spared = 0 if smaller is None else 1
        freed = _climb(ladder, free, tried) if work is operation and ladder.retries < MAX_RETRIES - spared else None
        if freed is not None:
            ladder = ladder.after_failure(freed)
            if on_retry is not None:
                on_retry(*tried[-1])
        elif work is operation and smaller is not None:
            work = smaller
        else:
            raise given_up(_give_up_message(said, tried, ladder.retries + (work is not operation)))


def _climb(ladder: Ladder, free: Callable[[Rung], int], tried: list[tuple[Rung, int]]) -> Rung | None:
    """Up to the first rung that frees something; None if none does."""
    for rung in ladder.climbs():
        count = free(rung)
        tried.append((rung, count))
        if count > 0:
            return rung
    return None


def let_go_of_frames(error: BaseException, handled_by_caller: BaseException | None = None) -> None:
    """Empty the frames that `error`, and the errors it came from, went through.

    Dropping the error alone is not enough where a frame holds the error, or its own traceback, in a local: such a cycle
    lives until the next collection. What the caller was handling already is its own: Python chains to it, we leave it.
    """
    kept = {id(link) for link in _chain(handled_by_caller)}
    for link in [link for link in _chain(error) if id(link) not in kept]:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all it came from, through causes and contexts, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__cause__, link.__context__]


def describe(error: BaseException) -> str:
    """The error's own text and the place that raised it: its traceback is about to go."""
    text = str(error) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{text} (in {frames[-1].name}, line {frames[-1].lineno})" if frames else text


def _give_up_message(said: str, tried: list[tuple[Rung, int]], retries: int) -> str:
    freed = ", ".join(f"{rung.words} {say_gib(count)}" if count > 0 else f"{rung.words} nothing" for rung, count in tried)
    times = {0: "without a retry", 1: "after 1 retry"}.get(retries, f"after {retries} retries")
    return f"{said}\nGave up {times}. Freed: {freed or 'nothing'}."
