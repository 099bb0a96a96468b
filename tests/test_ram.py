"""System memory beside the card: who needs it, when it is short, and what is said then."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram.plan.ram import RamModel, RamPhase, SystemMemory, frame_bytes, latent_bytes, plan_ram

GIB = 1 << 30
EXPERT = 14_288_491_584 * 2
"""Bytes of one WAN 2.2 A14B expert in 16 bit: its parameters, counted on the real class."""
ENCODER = 5_680_910_336 * 2
HIGH, LOW, TEXT = ("high", "generator", ""), ("low", "generator", ""), ("te", "text_encoder", "")


def experts() -> tuple[RamModel, ...]:
    return (
        RamModel(HIGH, "high_noise", EXPERT, EXPERT),
        RamModel(LOW, "low_noise", EXPERT, EXPERT),
    )


def test_two_14b_experts_in_16_bit_need_57_gb_of_system_memory() -> None:
    phases = [
        RamPhase("Text encoding", {}, frozenset({TEXT})),
        RamPhase("Sampling (high noise)", {HIGH: 10 * GIB}, frozenset({HIGH})),
        RamPhase("Sampling (low noise)", {LOW: 10 * GIB}, frozenset({LOW})),
    ]
    told = plan_ram(experts(), phases, SystemMemory(128 * GIB, 120 * GIB))
    assert told.need is not None
    assert 57_000_000_000 < told.need.expected < 57_400_000_000
    assert told.phase == "Sampling (low noise)", "the first has left the card and the second is not on it yet"


def test_a_machine_of_64_gb_keeps_two_experts_but_not_their_files() -> None:
    told = plan_ram(experts(), [RamPhase("Sampling", {}, frozenset({HIGH, LOW}))], SystemMemory(64 * GIB, 60 * GIB))
    assert told.verdict == "tight"
    assert "26.6 GB of model files" in told.message


def test_a_machine_of_32_gb_swaps_and_says_how_much() -> None:
    phases = [RamPhase("Sampling (low noise)", {}, frozenset({HIGH, LOW}))]
    told = plan_ram(experts(), phases, SystemMemory(32 * GIB, 30 * GIB, swap_free=64 * GIB))
    assert told.verdict == "tight"
    assert told.short == 2 * EXPERT - 30 * GIB
    assert told.message == (
        "Sampling (low noise) takes 53.2 GB more of this machine's system memory; 30.0 GB of 32.0 GB is free. "
        "23.2 GB would go to the page file, which is slower by far than any offloading."
    )


def test_without_a_page_file_it_does_not_fit() -> None:
    told = plan_ram(experts(), [RamPhase("Sampling", {}, frozenset({HIGH, LOW}))], SystemMemory(32 * GIB, 30 * GIB))
    assert told.verdict == "does_not_fit"
    assert "Short by 23.2 GB" in told.message


def test_a_card_that_holds_both_experts_asks_for_one_of_them_at_a_time() -> None:
    phases = [
        RamPhase("high", {HIGH: EXPERT}, frozenset({HIGH})),
        RamPhase("low", {HIGH: EXPERT, LOW: EXPERT}, frozenset({LOW})),
    ]
    told = plan_ram(experts(), phases, SystemMemory(128 * GIB, 120 * GIB))
    assert told.need is not None
    assert (told.need.expected, told.need.lower, told.need.upper) == (EXPERT, EXPERT, 2 * EXPERT)


def test_the_containers_limit_binds_before_the_machines_memory() -> None:
    memory = SystemMemory(256 * GIB, 200 * GIB, limit=48 * GIB, limit_used=8 * GIB)
    told = plan_ram(experts(), [RamPhase("Sampling", {}, frozenset({HIGH, LOW}))], memory)
    assert (told.room, told.verdict) == (40 * GIB, "does_not_fit")
    assert "of the container's memory; 40.0 GB of 48.0 GB is free" in told.message


def test_weights_on_the_card_take_no_system_memory() -> None:
    there = {HIGH: EXPERT, LOW: EXPERT}
    phases = [RamPhase("Sampling", there, frozenset({HIGH, LOW}))]
    told = plan_ram(experts(), phases, SystemMemory(64 * GIB, 60 * GIB), before=there)
    assert told.need is not None
    assert told.need.expected == 0


def test_originals_of_patched_weights_stay_while_the_patched_ones_are_on_the_card() -> None:
    model = RamModel(HIGH, "high_noise", EXPERT, EXPERT, patched=10 * GIB, lora_bytes=GIB)
    phases = [RamPhase("Sampling", {HIGH: EXPERT}, frozenset({HIGH}))]
    told = plan_ram([model], phases, SystemMemory(128 * GIB, 120 * GIB), before={HIGH: EXPERT})
    assert told.need is not None
    assert told.need.expected == 11 * GIB


def test_what_is_there_already_is_not_needed_again() -> None:
    models = [model._replace(present=EXPERT) for model in experts()]
    told = plan_ram(models, [RamPhase("Sampling", {}, frozenset({HIGH, LOW}))], SystemMemory(64 * GIB, 27 * GIB))
    assert (told.verdict, told.short) == ("fits", 0)


def test_elastic_weights_need_only_what_is_pinned_and_that_is_let_go() -> None:
    models = [model._replace(elastic=True) for model in experts()]
    memory = SystemMemory(64 * GIB, 60 * GIB, pinnable=40 * GIB)
    told = plan_ram(models, [RamPhase("Sampling", {HIGH: 10 * GIB}, frozenset({HIGH}))], memory)
    assert told.need is not None
    assert (told.need.expected, told.need.lower) == (EXPERT - 10 * GIB, 0)
    assert told.mapped == 2 * EXPERT


def test_files_of_elastic_weights_that_do_not_fit_are_read_again() -> None:
    models = [model._replace(elastic=True) for model in experts()]
    told = plan_ram(models, [RamPhase("Sampling", {}, frozenset({HIGH}))], SystemMemory(32 * GIB, 30 * GIB))
    assert told.verdict == "tight"
    assert told.short == 0


def test_81_frames_of_720p_take_0_9_gb_and_twice_that_while_they_are_decoded() -> None:
    frames = frame_bytes(1280, 720, 81)
    assert frames == 895_795_200
    told = plan_ram([], [RamPhase("Decoding", {}, decoding=frames)], SystemMemory(32 * GIB, 30 * GIB))
    assert told.need is not None
    assert (told.need.expected, told.need.lower, told.need.upper) == (2 * frames, frames, 3 * frames)


def test_a_latent_is_a_hundredth_of_its_video() -> None:
    assert latent_bytes(16, 21, 90, 160) == 19_353_600


def test_an_unknown_size_or_memory_is_unknown() -> None:
    phases = [RamPhase("Sampling", {})]
    model = RamModel(HIGH, "odd.gguf", None)
    assert plan_ram([model], phases, SystemMemory(1, 1)).verdict == "unknown"
    assert "odd.gguf" in plan_ram([model], phases, SystemMemory(1, 1)).message
    assert plan_ram(experts(), phases, None).verdict == "unknown"


def test_a_negative_size_is_named() -> None:
    with pytest.raises(ValueError, match="frames must not be negative"):
        frame_bytes(1, 1, -1)


SIZES = st.integers(0, 100 * GIB)


@given(
    size=SIZES,
    loaded=SIZES,
    patched=SIZES,
    present=SIZES,
    room=SIZES,
    more=SIZES,
    swap=SIZES,
    frames=SIZES,
    elastic=st.booleans(),
)
def test_more_memory_never_makes_it_worse(
    size: int, loaded: int, patched: int, present: int, room: int, more: int, swap: int, frames: int, elastic: bool
) -> None:
    order = ("does_not_fit", "tight", "fits")
    model = RamModel(HIGH, "high", size, size, elastic, patched=min(size, patched), present=present)
    phases = [RamPhase("Sampling", {HIGH: loaded}, frozenset({HIGH}), decoding=frames)]
    small, large = (plan_ram([model], phases, SystemMemory(free, free, swap_free=swap)) for free in (room, room + more))
    assert order.index(small.verdict) <= order.index(large.verdict)
    assert small.short >= large.short
