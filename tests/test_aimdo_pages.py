"""comfy-aimdo's rules as the simulation keeps them, one law each, in pages of 32 MiB. (tests/test_aimdo_native.py holds them to
the real library.)"""

from __future__ import annotations

import pytest
import torch
from host.comfyui.standin.pages import MIB, PAGE_BYTES, Buffer, CardPages, PagesOfAModelError, Vbar
from vram_headroom.vram.device import SimulatedCard

PAGE = PAGE_BYTES
LEFT_FREE = 256 * MIB + PAGE
"""The headroom, and one page: a layer that misses a page asks for that room twice (vbar.c:374-378 takes it off the surplus,
153-160 spend it once more)."""


def books_of(pages: int, others: int = 0, extra_headroom: int = 0) -> CardPages:
    """A card that layers of one page each fill with so many of them."""
    return CardPages(SimulatedCard(pages * PAGE + LEFT_FREE + others, others), extra_headroom)


def use(books: CardPages, vbar: Vbar, pages: range) -> list[int]:
    """A forward through layers of one page each; the pages that had to be streamed."""
    streamed: list[int] = []
    for page in pages:
        if books.fault(vbar, page * PAGE, PAGE) is None:
            streamed.append(page)
        else:
            books.unpin(vbar, page * PAGE, PAGE)
    return streamed


def resident(vbar: Vbar) -> list[int]:
    return [number for number, page in enumerate(vbar.pages) if page.resident]


def test_a_model_is_staged_for_nothing_and_comes_in_whole_pages() -> None:
    books = books_of(10)
    vbar = books.reserve(5 * PAGE + 1)
    assert (len(vbar.pages), books.total_usage, books.card.free_bytes) == (6, 0, 19 * PAGE)
    assert books.fault(vbar, PAGE - 1, 2) == (1, 1)
    assert (resident(vbar), vbar.resident_bytes, books.total_usage) == ([0, 1], 2 * PAGE, 2 * PAGE)


def test_a_model_gets_no_more_addresses_than_the_card_has_pages() -> None:
    books = books_of(10)
    vbar = books.reserve(1000 * PAGE)
    assert (len(vbar.pages), vbar.watermark) == (19, 19)


def test_a_model_fills_the_card_up_to_the_headroom_and_streams_the_rest() -> None:
    books = books_of(10)
    vbar = books.reserve(14 * PAGE)
    assert use(books, vbar, range(14)) == [10, 11, 12, 13]
    assert (resident(vbar), vbar.watermark) == (list(range(10)), 10)
    assert books.card.free_bytes == LEFT_FREE
    assert use(books, vbar, range(14)) == [10, 11, 12, 13]


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_a_layer_that_misses_pages_wants_their_room_twice(layer: int) -> None:
    for room, expected in ((2 * layer - 1, None), (2 * layer, (1,) * layer)):
        books = CardPages(SimulatedCard(room * PAGE + 256 * MIB))
        assert books.fault(books.reserve(layer * PAGE), 0, layer * PAGE) == expected


def test_another_programs_memory_counts_as_the_driver_reports_it() -> None:
    """The room asked for twice is of the capacity, and there. A page that then is refused costs the top one its place."""
    books = books_of(10, others=6 * PAGE)
    vbar = books.reserve(14 * PAGE)
    assert use(books, vbar, range(11)) == []
    assert books.card.free_bytes == 256 * MIB
    assert use(books, vbar, range(11, 14)) == [11, 12, 13]
    assert use(books, vbar, range(14)) == [10, 11, 12, 13]
    assert books.card.free_bytes == LEFT_FREE


def test_the_model_used_last_takes_pages_from_the_top_of_the_one_before() -> None:
    books = books_of(10)
    first, second = books.reserve(8 * PAGE), books.reserve(5 * PAGE)
    use(books, first, range(8))
    assert use(books, second, range(5)) == []
    assert (resident(first), first.watermark) == ([0, 1, 2, 3, 4], 5)
    assert resident(second) == [0, 1, 2, 3, 4]


def test_a_less_important_model_never_takes_a_page_from_a_more_important_one() -> None:
    books = books_of(10)
    first, second = books.reserve(8 * PAGE), books.reserve(8 * PAGE)
    use(books, second, range(8))
    assert use(books, first, range(8)) == [2, 3, 4, 5, 6, 7]
    assert (len(resident(first)), len(resident(second))) == (2, 8)


def test_to_prioritize_lets_every_page_come_back() -> None:
    books = books_of(10)
    first, second = books.reserve(8 * PAGE), books.reserve(8 * PAGE)
    use(books, first, range(8))
    use(books, second, range(8))
    assert (first.watermark, use(books, first, range(8))) == (2, [2, 3, 4, 5, 6, 7])
    books.prioritize(first)
    assert (first.watermark, use(books, first, range(8))) == (8, [])
    assert (resident(second), books.order) == ([0, 1], (second, first))


def test_a_model_that_is_deprioritized_keeps_its_pages_until_they_are_needed() -> None:
    books = books_of(10)
    first, second = books.reserve(4 * PAGE), books.reserve(4 * PAGE)
    use(books, first, range(4))
    use(books, second, range(4))
    books.deprioritize(second)
    assert len(resident(second)) == 4
    use(books, books.reserve(4 * PAGE), range(4))
    assert (len(resident(first)), len(resident(second))) == (4, 2)


def test_a_lower_page_that_is_missing_costs_the_same_model_its_top_ones() -> None:
    books = books_of(10)
    vbar, other = books.reserve(10 * PAGE), books.reserve(6 * PAGE)
    use(books, vbar, range(6, 10))
    use(books, other, range(6))
    assert use(books, vbar, range(1)) == []
    assert (resident(vbar), vbar.watermark, len(resident(other))) == ([0, 6, 7, 8], 9, 6)


def test_a_pinned_page_stays_below_a_fallen_watermark_and_goes_with_its_last_pin() -> None:
    books = books_of(10)
    vbar = books.reserve(4 * PAGE)
    books.fault(vbar, 3 * PAGE, PAGE)
    books.fault(vbar, 3 * PAGE, PAGE)
    assert books.free(vbar, 4 * PAGE) == 0
    assert (vbar.watermark, vbar.residency()) == (0, [0, 0, 0, 3])
    books.unpin(vbar, 3 * PAGE, PAGE)
    assert vbar.residency()[3] == 3
    books.unpin(vbar, 3 * PAGE, PAGE)
    assert (vbar.residency()[3], books.total_usage) == (0, 0)


def test_the_serial_of_a_page_tells_that_it_has_been_away() -> None:
    books = books_of(10)
    vbar = books.reserve(2 * PAGE)
    assert [books.fault(vbar, 0, 2 * PAGE), books.fault(vbar, 0, 2 * PAGE)] == [(1, 1), (1, 1)]
    books.unpin(vbar, 0, 2 * PAGE)
    books.unpin(vbar, 0, 2 * PAGE)
    books.free(vbar, PAGE)
    books.prioritize(vbar)
    assert books.fault(vbar, 0, 2 * PAGE) == (1, 2)


def test_a_watermark_limit_stops_every_kind_of_eviction_until_limits_are_reset() -> None:
    books = books_of(10)
    kept, other = books.reserve(6 * PAGE), books.reserve(10 * PAGE)
    use(books, kept, range(6))
    books.set_watermark_limit(kept, 4 * PAGE - 1)
    assert use(books, other, range(10)) == [6, 7, 8, 9]
    assert books.free(kept, 100 * PAGE) == 0
    assert books.evict(100 * PAGE) == 94
    assert (resident(kept), resident(other)) == ([0, 1, 2, 3], [])
    books.reset_watermark_limits()
    assert books.free(kept, PAGE + 1) == 2 * PAGE
    assert resident(kept) == [0, 1]


def test_a_larger_simple_headroom_is_kept_free_and_a_smaller_one_changes_nothing() -> None:
    books = books_of(10)
    vbar = books.reserve(10 * PAGE)
    books.simple_headroom = 0
    assert use(books, vbar, range(10)) == []
    books.simple_headroom = 256 * MIB + 3 * PAGE
    assert use(books, vbar, range(10)) == [8, 9]
    books.simple_headroom = 0
    assert use(books, vbar, range(10)) == [8, 9], "pages come back only when the model is prioritized"


def test_the_extra_headroom_comes_on_top() -> None:
    books = books_of(10, extra_headroom=3 * PAGE)
    assert use(books, books.reserve(10 * PAGE), range(10)) == [8, 9]


def test_the_driver_is_asked_every_two_seconds_only() -> None:
    now = 10_000
    card = SimulatedCard(10 * PAGE + LEFT_FREE)
    books = CardPages(card, clock=lambda: now)
    vbar = books.reserve(10 * PAGE)
    use(books, vbar, range(10))
    card.set_others(4 * PAGE)
    now += 1999
    assert use(books, vbar, range(10)) == []
    now += 1
    assert use(books, vbar, range(10)) == [7, 8, 9]
    assert card.free_bytes == 256 * MIB


def test_pages_leave_before_a_tensor_is_refused_and_then_it_is_refused_as_ever() -> None:
    books = books_of(10)
    vbar = books.reserve(10 * PAGE)
    use(books, vbar, range(10))
    tensor = books.allocate(6 * PAGE, "activations")
    assert (len(resident(vbar)), books.card.free_bytes) == (5, 256 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        books.allocate(14 * PAGE, "too much")
    assert resident(vbar) == []
    books.release(tensor)
    assert (books.total_usage, books.card.free_bytes) == (0, 19 * PAGE)


@pytest.mark.parametrize(
    ("nbytes", "counted"),
    [(1, 1024), (1024, 1024), (1025, 1025), (MIB, MIB), (MIB + 1, 2 * MIB), (3 * MIB, 4 * MIB)],
)
def test_a_tensor_is_counted_as_the_library_guesses_its_size(nbytes: int, counted: int) -> None:
    books = books_of(10)
    books.allocate(nbytes, "tensor")
    assert (books.total_usage, books.card.free_bytes) == (counted, 19 * PAGE - nbytes)


def test_a_buffer_grows_in_chunks_that_pages_make_room_for_and_is_counted() -> None:
    books = books_of(10)
    vbar = books.reserve(10 * PAGE)
    use(books, vbar, range(10))
    buffer = Buffer(1024 * MIB, "buffer")
    assert books.grow(buffer, 33 * MIB)
    assert (buffer.allocated, len(resident(vbar)), books.total_usage) == (48 * MIB, 9, 9 * PAGE + 48 * MIB)
    assert not books.grow(buffer, 1024 * MIB)
    books.destroy(buffer)
    assert books.total_usage == vbar.resident_bytes == books.resident_bytes == 0


def test_a_page_that_the_driver_refuses_though_nothing_is_left_to_evict_is_an_error() -> None:
    card = SimulatedCard(10 * PAGE + LEFT_FREE)
    books = CardPages(card, clock=lambda: 10_000)
    vbar = books.reserve(10 * PAGE)
    books.set_watermark_limit(vbar, 10 * PAGE)
    books.fault(vbar, 0, PAGE)
    card.set_others(18 * PAGE)
    with pytest.raises(PagesOfAModelError):
        books.fault(vbar, 0, 2 * PAGE)


def test_a_forgotten_model_leaves_nothing_pinned_or_not() -> None:
    books = books_of(10)
    vbar = books.reserve(10 * PAGE)
    books.fault(vbar, 0, 3 * PAGE)
    books.forget(vbar)
    assert (books.total_usage, books.card.free_bytes, books.order) == (0, 19 * PAGE, ())
