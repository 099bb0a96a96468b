"""The simulated caching allocator, against sequences worked out by hand from torch's rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram.allocator import CachingAllocator, Reserved, replay, rounded, segment_bytes

MIB = 1 << 20


def test_a_request_is_rounded_up_to_512_bytes() -> None:
    assert [rounded(n) for n in (1, 511, 512, 513, MIB + 1)] == [512, 512, 512, 1024, MIB + 512]


def test_a_segment_is_2_mib_then_20_mib_then_a_multiple_of_2_mib() -> None:
    sizes = (512, MIB, MIB + 512, 10 * MIB - 512, 10 * MIB, 21 * MIB, 22 * MIB)
    assert [segment_bytes(n) // MIB for n in sizes] == [2, 2, 20, 20, 10, 22, 22]


def test_small_requests_share_a_segment_of_2_mib() -> None:
    assert replay([(0, 300_000), (1, MIB), (2, 700_000)]) == Reserved(300_032 + MIB + 700_416, 2 * MIB, 300_000 + MIB + 700_000)
    assert replay([(0, 300_000), (1, MIB), (2, 800_000)]).reserved == 4 * MIB


def test_requests_of_a_few_mib_share_a_segment_of_20_mib() -> None:
    assert replay([(n, 5 * MIB) for n in range(4)]).reserved == 20 * MIB
    assert replay([(n, 5 * MIB) for n in range(5)]).reserved == 40 * MIB


def test_a_freed_segment_serves_the_next_request_that_fits_in_it() -> None:
    assert replay([(0, 100 * MIB), (0, -1), (1, 40 * MIB), (2, 60 * MIB)]) == Reserved(100 * MIB, 100 * MIB, 100 * MIB)
    assert replay([(0, 100 * MIB), (0, -1), (1, 40 * MIB), (2, 61 * MIB)]).reserved == (100 + 62) * MIB


def test_neighbours_that_are_free_become_one_block_in_any_order() -> None:
    pieces = [(0, 90 * MIB), (0, -1), (1, 30 * MIB), (2, 30 * MIB), (3, 30 * MIB)]
    for order in ([1, 2, 3], [3, 2, 1], [1, 3, 2], [2, 1, 3]):
        assert replay([*pieces, *((n, -1) for n in order), (4, 90 * MIB)]).reserved == 90 * MIB
    assert replay([*pieces, (1, -1), (3, -1), (4, 60 * MIB)]).reserved == 150 * MIB


def test_segments_never_become_one_block() -> None:
    assert replay([(0, 20 * MIB), (1, 20 * MIB), (0, -1), (1, -1), (2, 40 * MIB)]).reserved == 80 * MIB


def test_a_large_block_is_not_split_for_a_rest_of_1_mib() -> None:
    kept = replay([(0, 100 * MIB), (0, -1), (1, 99 * MIB)])
    assert kept == Reserved(100 * MIB, 100 * MIB, 100 * MIB)
    whole = CachingAllocator()
    whole.make(0, 100 * MIB)
    whole.free(0)
    whole.make(1, 99 * MIB)
    assert whole.allocated == 100 * MIB
    assert whole.requested == 99 * MIB
    whole.free(1)
    whole.make(2, 99 * MIB - 512)
    assert whole.allocated == 99 * MIB - 512


def test_the_smallest_block_that_fits_is_taken() -> None:
    shelf = [(0, 200 * MIB), (1, 50 * MIB), (0, -1), (1, -1)]
    assert replay([*shelf, (2, 40 * MIB), (3, 200 * MIB)]).reserved == 250 * MIB


def test_small_requests_do_not_come_out_of_large_segments() -> None:
    assert replay([(0, 100 * MIB), (0, -1), (1, 512)]).reserved == 102 * MIB


def test_a_request_that_makes_no_sense_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="name 7 is in use already"):
        replay([(7, 512), (7, 512)])
    with pytest.raises(ValueError, match="name 8 is not in use"):
        replay([(8, -512)])
    with pytest.raises(ValueError, match="block 9"):
        replay([(9, 0)])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 64 * MIB)), max_size=60))
def test_reserved_holds_allocated_and_allocated_what_was_requested(steps: list[tuple[int, int]]) -> None:
    allocator, held = CachingAllocator(), dict[int, int]()
    for name, nbytes in steps:
        if name in held:
            allocator.free(name)
            del held[name]
        else:
            allocator.make(name, nbytes)
            held[name] = nbytes
        assert sum(held.values()) == allocator.requested <= allocator.allocated <= allocator.reserved
    for name in held:
        allocator.free(name)
    assert allocator.allocated == allocator.requested == 0
    peaks = allocator.peaks()
    assert peaks.requested <= peaks.allocated <= peaks.reserved
