"""Cards: what they report, and that the simulated one keeps its books as a real one would."""

import threading

import pytest
import torch
from vram_headroom.vram.device import (
    CallbackAccelerator,
    DeviceReadError,
    MemoryReading,
    SimulatedCard,
    TorchAccelerator,
    discover,
)

GIB = 1 << 30


def test_a_full_card_raises_torchs_own_error_and_books_nothing() -> None:
    card = SimulatedCard(16 * GIB, others=2 * GIB, name="Toy 16 GB")
    kept = card.allocate(10 * GIB, "generator")
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 5\.0 GB\. Toy 16 GB .* of which 4\.0 GB is free"):
        card.allocate(5 * GIB, "activations")
    assert card.booked_bytes == 10 * GIB
    assert card.bookings == (kept,)


def test_what_is_released_can_be_booked_again_and_the_peak_remains() -> None:
    card = SimulatedCard(8 * GIB)
    first = card.allocate(6 * GIB, "text encoder")
    card.release(first)
    card.allocate(5 * GIB, "generator")
    assert (card.booked_bytes, card.free_bytes, card.peak_bytes) == (5 * GIB, 3 * GIB, 6 * GIB)


def test_a_booking_is_released_once() -> None:
    card = SimulatedCard(GIB)
    booking = card.allocate(10, "x")
    card.release(booking)
    with pytest.raises(ValueError, match="is not booked"):
        card.release(booking)
    with pytest.raises(ValueError, match="is not booked"):
        card.resize(booking, 20)
    assert card.booked_bytes == 0


def test_a_growth_that_does_not_fit_leaves_the_booking_as_it_was() -> None:
    card = SimulatedCard(100)
    booking = card.allocate(60, "x")
    with pytest.raises(torch.OutOfMemoryError):
        card.resize(booking, 101)
    assert (booking.nbytes, card.free_bytes) == (60, 40)
    card.resize(booking, 10)
    assert card.free_bytes == 90


def test_other_programs_may_leave_less_than_nothing() -> None:
    card = SimulatedCard(100)
    card.allocate(80, "x")
    card.set_others(50)
    assert card.read() == MemoryReading(total=100, free=0, reserved=80, active=80)
    assert card.used_bytes == 130


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_card_without_capacity_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        SimulatedCard(capacity)


def test_ten_threads_booking_and_releasing_leave_the_books_at_zero() -> None:
    card = SimulatedCard(1000)
    refused = []

    def work(seed: int) -> None:
        for step in range(200):
            try:
                booking = card.allocate((seed * 37 + step * 11) % 300, f"thread {seed}")
            except torch.OutOfMemoryError:
                refused.append(seed)
            else:
                card.release(booking)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert card.booked_bytes == 0
    assert card.peak_bytes <= 1000


def test_a_machine_without_an_accelerator_has_no_cards() -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        assert discover()
    else:
        assert discover() == ()


def test_a_driver_that_does_not_answer_is_named() -> None:
    with pytest.raises(DeviceReadError, match="cuda:7 did not answer"):
        TorchAccelerator("cuda", 7).read()

    def broken() -> MemoryReading:
        raise RuntimeError("device lost")

    with pytest.raises(DeviceReadError, match="Odd card did not answer a memory query: device lost"):
        CallbackAccelerator("Odd card", broken).read()


class Driver:
    """What `torch.cuda` and `torch.xpu` offer, as far as they are asked."""

    def __init__(self, free: int, total: int, reserved: int, active: int) -> None:
        self._read = (free, total)
        self._stats = {"reserved_bytes.all.current": reserved, "active_bytes.all.current": active}

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self._read

    def memory_stats(self, index: int) -> dict[str, int]:
        return self._stats

    def get_device_name(self, index: int) -> str:
        return f"Card {index}"

    def device_count(self) -> int:
        return 2

    def is_available(self) -> bool:
        return True


def test_a_torch_card_is_read_from_its_driver_and_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Driver(free=6, total=10, reserved=3, active=2))
    cards = discover()
    assert [(card.index, card.name, card.kind) for card in cards] == [(0, "Card 0", "cuda"), (1, "Card 1", "cuda")]
    assert cards[0].read() == MemoryReading(total=10, free=6, reserved=3, active=2)


def test_rocm_goes_by_torchs_cuda_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Driver(6, 10, 3, 2))
    monkeypatch.setattr(torch.version, "hip", "7.14")
    assert discover()[0].kind == "rocm"


def test_an_allocator_that_was_never_used_holds_nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(6, 10, 3, 2)
    driver._stats = {}
    monkeypatch.setattr(torch, "cuda", driver)
    assert discover()[0].read() == MemoryReading(total=10, free=6, reserved=None, active=None)


def test_xpu_is_found_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "xpu", Driver(6, 10, 3, 2))
    assert [(card.kind, card.read().free) for card in discover()] == [("xpu", 6), ("xpu", 6)]


def test_an_xpu_without_a_driver_reading_counts_what_its_own_allocator_took(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldXPU:
        def get_device_properties(self, index: int) -> object:
            return type("Properties", (), {"total_memory": 100})()

        def memory_reserved(self, index: int) -> int:
            return 30

    monkeypatch.setattr(torch, "xpu", OldXPU())
    monkeypatch.delattr(torch.accelerator, "get_memory_info", raising=False)
    assert TorchAccelerator("xpu", 0).read() == MemoryReading(total=100, free=70, reserved=None, active=None)


def test_apples_gpu_is_as_large_as_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 40)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 25)
    (card,) = discover()
    assert (card.kind, card.read()) == ("mps", MemoryReading(total=100, free=60, reserved=40, active=25))
