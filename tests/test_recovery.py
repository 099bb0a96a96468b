"""The ladder: what counts as out of memory, how far a retry climbs, and what is let go before anything is freed."""

import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram import recovery
from vram_headroom.vram.recovery import (
    MAX_RETRIES,
    Ladder,
    OutOfMemoryError,
    Rung,
    is_out_of_memory,
    run_with_recovery,
)
from vram_headroom.vram.units import MIB


class Interrupt(BaseException):
    """As ComfyUI's InterruptProcessingException: no Exception."""


class Work:
    """Runs out of memory the first `failures` times, then answers 7."""

    def __init__(
        self, failures: int, error: Callable[[], BaseException] = lambda: OutOfMemoryError("CUDA out of memory")
    ) -> None:
        self.failures = failures
        self.calls = 0
        self._error = error

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise self._error()
        return 7


class Freeing:
    """Frees what the table says, and writes down which rungs were asked."""

    def __init__(self, **freed: int) -> None:
        self.asked: list[Rung] = []
        self._freed = {Rung[name]: count for name, count in freed.items()}

    def __call__(self, rung: Rung) -> int:
        self.asked.append(rung)
        return self._freed.get(rung, 0)


EVERYTHING = dict.fromkeys(Rung.__members__, MIB)


# what counts as out of memory


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 4.00 GiB total capacity)",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "HIP out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 15.98 GiB",
        "HIP error: out of memory",
        "XPU out of memory. Tried to allocate 59.61 GiB. GPU 0 has a total capacity of 28.55 GiB",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 GB, max allowed: 6.80 GB).",
        "NPU out of memory. Tried to allocate 9.98 GiB (NPU 0; 61.28 GiB total)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cudaErrorMemoryAllocation",
        "Could not allocate tensor with 52428800 bytes. There is not enough GPU video memory available!",
        "VRAM grow failed: 1073741824 bytes",
        "VRAM reservation failed",
        "Fault failed: 2",
    ],
)
def test_each_backends_text_counts_in_a_runtime_error_only(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(KeyboardInterrupt(text))


def test_errors_of_the_kind_need_no_text() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OutOfMemoryError("what a ladder ends with"))


def test_the_cpu_allocators_real_error_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "Fault failed: 20",
        "Fault failed: 3",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED",
        "VRAM destroy failed: device context unavailable",
        "mat1 and mat2 shapes cannot be multiplied",
        "",
    ],
)
def test_other_runtime_errors_do_not_count(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(("code", "counts"), [(2, True), (700, False), (None, False)])
def test_an_accelerator_error_counts_by_its_code(code: int | None, counts: bool) -> None:
    error = torch.AcceleratorError("CUDA error: unspecified")
    if code is not None:
        error.__dict__["error_code"] = code
    assert is_out_of_memory(error) is counts


def test_an_accelerator_error_without_a_code_counts_by_its_text() -> None:
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))


def test_a_torch_without_accelerator_errors_still_has_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_AcceleratorError", None)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))


def test_an_interrupt_is_never_out_of_memory() -> None:
    assert not is_out_of_memory(Interrupt("CUDA out of memory"))
    assert not is_out_of_memory(SystemExit("CUDA out of memory"))


# the ladder and the budget


def test_rungs_rise_from_what_costs_nothing_to_the_pins() -> None:
    order = ["CACHE", "IDLE_PIPELINES", "TEXT_ENCODER", "PART_OF_GENERATOR", "PINS"]
    assert [rung.name for rung in sorted(Rung)] == order
    assert Ladder().climbs() == tuple(Rung)


def test_a_failure_leaves_only_what_is_above_and_success_starts_over() -> None:
    ladder = Ladder().after_failure(Rung.IDLE_PIPELINES)
    assert ladder == Ladder(retries=1, rung=Rung.IDLE_PIPELINES)
    assert ladder.climbs() == (Rung.TEXT_ENCODER, Rung.PART_OF_GENERATOR, Rung.PINS)
    assert ladder.after_success() == Ladder()


def test_a_ladder_ends_after_three_retries_or_at_the_pins() -> None:
    used_up = Ladder().after_failure(Rung.CACHE).after_failure(Rung.IDLE_PIPELINES).after_failure(Rung.TEXT_ENCODER)
    assert (used_up.retries, used_up.exhausted, used_up.climbs()) == (3, True, ())
    assert Ladder().after_failure(Rung.PINS).exhausted
    assert not Ladder().exhausted


@pytest.mark.parametrize("rung", [Rung.CACHE, Rung.TEXT_ENCODER])
def test_a_ladder_is_not_climbed_downwards(rung: Rung) -> None:
    with pytest.raises(ValueError, match=rung.name):
        Ladder().after_failure(Rung.TEXT_ENCODER).after_failure(rung)


# running with recovery


def test_work_that_fits_frees_nothing() -> None:
    free = Freeing(**EVERYTHING)
    assert run_with_recovery(Work(0), free) == 7
    assert free.asked == []


def test_each_failure_climbs_one_rung_that_frees() -> None:
    work, free, told = Work(3), Freeing(**EVERYTHING), list[tuple[Rung, int]]()
    assert run_with_recovery(work, free, lambda rung, freed: told.append((rung, freed))) == 7
    assert work.calls == 4
    assert free.asked == [Rung.CACHE, Rung.IDLE_PIPELINES, Rung.TEXT_ENCODER]
    assert told == [(rung, MIB) for rung in free.asked]


def test_a_rung_that_frees_nothing_costs_no_retry() -> None:
    work, free = Work(2), Freeing(PART_OF_GENERATOR=5 * MIB, PINS=MIB)
    assert run_with_recovery(work, free) == 7
    assert work.calls == 3
    assert free.asked == list(Rung)


def test_three_retries_are_the_end_even_if_more_could_be_freed() -> None:
    work, free = Work(10), Freeing(**EVERYTHING)
    with pytest.raises(OutOfMemoryError, match="after 3 retries"):
        run_with_recovery(work, free)
    assert work.calls == 1 + MAX_RETRIES
    assert free.asked == [Rung.CACHE, Rung.IDLE_PIPELINES, Rung.TEXT_ENCODER]


def test_with_nothing_to_free_the_first_failure_is_the_last() -> None:
    work, free = Work(10), Freeing()
    with pytest.raises(OutOfMemoryError, match="without a retry"):
        run_with_recovery(work, free)
    assert (work.calls, free.asked) == (1, list(Rung))


def test_the_last_error_says_what_failed_where_and_what_was_tried() -> None:
    work = Work(10, lambda: RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB)"))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_with_recovery(work, Freeing(IDLE_PIPELINES=1536 * MIB, PINS=20 * MIB))
    text = str(caught.value)
    assert text.startswith("MPS backend out of memory (MPS allocated: 5.56 GB) (in __call__, line ")
    assert text.endswith(
        "Gave up after 2 retries. Freed: allocator cache nothing, idle pipelines 1.5 GB, text encoder nothing, "
        "part of the generator nothing, pinned components 20 MB."
    )
    assert is_out_of_memory(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_every_run_starts_at_the_bottom_again() -> None:
    free = Freeing(**EVERYTHING)
    run_with_recovery(Work(2), free)
    run_with_recovery(Work(1), free)
    assert free.asked == [Rung.CACHE, Rung.IDLE_PIPELINES, Rung.CACHE]


@pytest.mark.parametrize(
    "error", [Interrupt("CUDA out of memory"), KeyboardInterrupt(), ValueError("bad"), RuntimeError("bad")]
)
@pytest.mark.parametrize("failures_before", [0, 1])
def test_interrupts_and_other_errors_pass_untouched_at_once(error: BaseException, failures_before: int) -> None:
    free, calls = Freeing(**EVERYTHING), list[int]()

    def work() -> None:
        calls.append(1)
        if len(calls) <= failures_before:
            raise MemoryError
        raise error

    with pytest.raises(type(error)) as caught:
        run_with_recovery(work, free)
    assert caught.value is error
    assert caught.traceback[-1].name == "work"
    assert (len(calls), len(free.asked)) == (failures_before + 1, failures_before)


@pytest.mark.parametrize("error", [Interrupt(), OSError("no RAM to offload to")])
def test_what_free_raises_passes_too(error: BaseException) -> None:
    work = Work(1)

    def free(rung: Rung) -> int:
        raise error

    with pytest.raises(type(error)):
        run_with_recovery(work, free)
    assert work.calls == 1


# the last resort, and no retry at all


def test_the_last_resort_is_the_third_retry_whatever_could_still_be_freed() -> None:
    work, smaller, free = Work(9), Work(0), Freeing(**EVERYTHING)
    assert run_with_recovery(work, free, last_resort=lambda: smaller) == 7
    assert (work.calls, smaller.calls) == (3, 1)
    assert free.asked == [Rung.CACHE, Rung.IDLE_PIPELINES]


def test_the_last_resort_comes_at_once_where_nothing_can_be_freed_and_not_before() -> None:
    work, smaller = Work(9), Work(0)
    assert run_with_recovery(work, Freeing(), last_resort=lambda: smaller) == 7
    assert (work.calls, smaller.calls) == (1, 1)
    untouched = Work(0)
    assert run_with_recovery(Work(2), Freeing(**EVERYTHING), last_resort=lambda: untouched) == 7
    assert untouched.calls == 0


@pytest.mark.parametrize(("freeing", "words"), [(EVERYTHING, "after 3 retries"), ({}, "after 1 retry")])
def test_a_last_resort_that_fails_is_the_end(freeing: dict[str, int], words: str) -> None:
    smaller = Work(9)
    with pytest.raises(OutOfMemoryError, match=words):
        run_with_recovery(Work(9), Freeing(**freeing), last_resort=lambda: smaller)
    assert smaller.calls == 1


def test_what_is_refused_is_neither_freed_for_nor_tried_again_and_says_why() -> None:
    work, smaller, free = Work(9), Work(0), Freeing(**EVERYTHING)
    with pytest.raises(OutOfMemoryError, match=r"(?s)CUDA out of memory.*Not tried again: it keeps state of its own"):
        run_with_recovery(work, free, last_resort=lambda: smaller, refuse=lambda: "it keeps state of its own")
    assert (work.calls, smaller.calls, free.asked) == (1, 0, [])


def test_a_refusal_is_asked_for_only_once_memory_has_run_out() -> None:
    asked: list[int] = []
    assert run_with_recovery(Work(0), Freeing(), refuse=lambda: asked.append(1) or "no") == 7
    assert asked == []
    assert run_with_recovery(Work(2), Freeing(**EVERYTHING), refuse=lambda: asked.append(1)) == 7
    assert asked == [1]


# what the failed frames hold


class Pinning:
    """Fails once with a tensor in a local of the failed frame, in the way given; `free` finds the tensor gone or not."""

    def __init__(self, fail: Callable[[torch.Tensor], None]) -> None:
        self._fail = fail
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.gone: list[bool] = []

    def __call__(self) -> str:
        if self.tensors:
            return "done"
        activation = torch.zeros(1024)
        self.tensors.append(weakref.ref(activation))
        self._fail(activation)
        return "not reached"

    def free(self, rung: Rung) -> int:
        self.gone.append(self.tensors[-1]() is None)
        return MIB


def fail_plainly(activation: torch.Tensor) -> None:
    raise OutOfMemoryError("CUDA out of memory")


def fail_while_handling(activation: torch.Tensor) -> None:
    try:
        raise RuntimeError("attention kernel not available")
    except RuntimeError:
        fail_plainly(activation)


def fail_because_of_another(activation: torch.Tensor) -> None:
    try:
        fail_plainly(activation)
    except OutOfMemoryError as cause:
        raise RuntimeError("DefaultCPUAllocator: not enough memory") from cause


def fail_holding_the_error(activation: torch.Tensor) -> None:
    """The frame holds the error, the error its traceback, the traceback the frame."""
    kept = OutOfMemoryError("CUDA out of memory")
    raise kept


def fail_holding_the_traceback(activation: torch.Tensor) -> None:
    kept: list[types.TracebackType | None] = []
    try:
        fail_plainly(activation)
    except OutOfMemoryError:
        kept.append(sys.exc_info()[2])
        raise


def fail_in_a_context(activation: torch.Tensor) -> None:
    @contextmanager
    def scope() -> Iterator[None]:
        held = activation
        yield
        del held

    with scope():
        fail_plainly(activation)


@pytest.mark.parametrize(
    "fail",
    [
        fail_plainly,
        fail_while_handling,
        fail_because_of_another,
        fail_holding_the_error,
        fail_holding_the_traceback,
        fail_in_a_context,
    ],
)
def test_a_tensor_pinned_only_by_failed_frames_is_gone_before_anything_is_freed(fail: Callable[[torch.Tensor], None]) -> None:
    work = Pinning(fail)
    gc.disable()
    try:
        assert run_with_recovery(work, work.free) == "done"
    finally:
        gc.enable()
    assert work.gone == [True]


def test_an_error_that_somebody_keeps_keeps_no_frames() -> None:
    kept = OutOfMemoryError("CUDA out of memory")
    kept.__cause__ = RuntimeError("the driver said so")
    assert run_with_recovery(Work(1, lambda: kept), Freeing(CACHE=MIB)) == 7
    assert kept.__traceback__ is None


def test_the_error_in_hand_is_over_before_anything_is_freed() -> None:
    handled: list[BaseException | None] = []

    def free(rung: Rung) -> int:
        handled.append(sys.exc_info()[1])
        return MIB

    run_with_recovery(Work(1), free)
    assert handled == [None]


@pytest.mark.parametrize("failures", [1, 9])
def test_an_error_the_caller_was_handling_keeps_its_traceback_and_frames(failures: int) -> None:
    ours: list[BaseException] = []

    def caller() -> None:
        try:
            fail_while_handling(torch.zeros(1))
        except OutOfMemoryError:
            try:
                run_with_recovery(Work(failures), Freeing(CACHE=MIB))
            except OutOfMemoryError as error:
                ours.append(error)
            raise

    with pytest.raises(OutOfMemoryError) as caught:
        caller()
    theirs = caught.value
    assert [error.__context__ for error in ours] == [theirs] * (failures > 1)
    assert "activation" in innermost_locals(theirs)
    assert theirs.__context__ is not None
    assert "activation" in innermost_locals(theirs.__context__)


def innermost_locals(error: BaseException) -> dict[str, object]:
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return {} if step is None else step.tb_frame.f_locals


# over all sequences


@given(failures=st.integers(0, 8), freed=st.lists(st.integers(-1, 3), min_size=len(Rung), max_size=len(Rung)))
def test_rungs_strictly_rise_and_never_more_than_three_retries(failures: int, freed: list[int]) -> None:
    work, free = Work(failures), Freeing(**dict(zip(Rung.__members__, freed, strict=True)))
    retries: list[Rung] = []
    useful = [rung for rung, count in zip(Rung, freed, strict=True) if count > 0]
    enough = failures <= min(len(useful), MAX_RETRIES)
    try:
        assert run_with_recovery(work, free, lambda rung, count: retries.append(rung)) == 7
        assert enough
    except OutOfMemoryError:
        assert not enough
    assert work.calls == len(retries) + 1 <= MAX_RETRIES + 1
    assert free.asked == list(Rung)[: len(free.asked)], "every rung once, none left out on the way up"
    assert retries == useful[: len(retries)]


@given(st.lists(st.sampled_from([*Rung, None])))
def test_no_sequence_of_failures_and_successes_breaks_the_ladder(events: list[Rung | None]) -> None:
    ladder = Ladder()
    for event in events:
        if event is None:
            ladder = ladder.after_success()
            assert ladder == Ladder()
        elif event in ladder.climbs():
            above = ladder.after_failure(event)
            assert above.retries == ladder.retries + 1 <= MAX_RETRIES
            assert set(above.climbs()) < set(ladder.climbs())
            ladder = above
        else:
            with pytest.raises(ValueError, match=event.name):
                ladder.after_failure(event)
        assert ladder.exhausted is (ladder.retries == MAX_RETRIES or ladder.rung is Rung.PINS)
