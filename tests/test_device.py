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
