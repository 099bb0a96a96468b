"""Laws of plans over random graphs and cards: more room never hurts, more video never takes less.

A plan has discrete choices: cond and uncond together or not, a decode whole or in tiles, which weights stay on the card. Memory
is compared where those are equal: two forwards at once that just fit need more than one, on a larger card too.
"""

from typing import Any

import planlab
from hypothesis import given, settings
from hypothesis import strategies as st
from planlab import node
from vram_headroom.vram.estimate.estimate import Estimate
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.types import HostRules, NodeSpec, PhasePlan, Plan

AMPLE = 4_000_000
"""UNITs of a card that every graph here fits whole, with cond and uncond together."""

VOCABULARY = {
    **planlab.VOCABULARY,
    "VAEDecodeTiled": NodeSpec({"samples": "LATENT", "vae": "VAE", "tile_size": "INT", "overlap": "INT"}, ("IMAGE",)),
}

VIDEOS = st.fixed_dictionaries(
    {
        "width": st.integers(8, 240).map(lambda cells: 8 * cells),
        "height": st.integers(8, 240).map(lambda cells: 8 * cells),
        "length": st.integers(1, 300),
        "batch_size": st.integers(1, 4),
    }
)
MORE = st.fixed_dictionaries(
    {
        "width": st.sampled_from([0, 0, 8, 16, 320]),
        "height": st.sampled_from([0, 0, 8, 16, 320]),
        "length": st.sampled_from([0, 1, 3, 4, 40]),
        "batch_size": st.sampled_from([0, 0, 1, 2]),
    }
)
HOSTS = st.builds(
    HostRules,
    patchers=st.sampled_from(["legacy", "dynamic"]),
    vram_state=st.sampled_from(["NORMAL_VRAM", "HIGH_VRAM", "LOW_VRAM", "NO_VRAM"]),
    gpu_only=st.booleans(),
    smart_memory=st.booleans(),
    flash_attention=st.booleans(),
    vae_compute_bytes=st.sampled_from([2, 4]),
)
CARDS = st.integers(1, 40_000)


def plan_of(video: dict[str, int], units: int, rules: HostRules, tile: int | None = None) -> Plan:
    prompt: dict[str, Any] = planlab.two_experts(fast=False, **video)
    if tile is not None:
        prompt["87"] = node("VAEDecodeTiled", samples=("78", 0), vae=("73", 0), tile_size=tile, overlap=64)
    card = planlab.card(units)
    return make_plan(build_chain(prompt, VOCABULARY, planlab.library, rules, card), card, rules)


def choices(planned: PhasePlan) -> tuple[object, ...]:
    """What of a phase is decided, not measured. ComfyUI cuts its own tiles by the size of the card, in time too."""
    tiles = (planned.tiled, planned.activation) if planned.tiled else None
    return (planned.batched, planned.at_once, tiles, planned.resident, planned.others)


# more room


@given(video=VIDEOS, units=CARDS, more=st.integers(1, 40_000), rules=HOSTS)
@settings(max_examples=200, deadline=None)
def test_a_larger_card_never_turns_what_fits_into_anything_worse(
    video: dict[str, int], units: int, more: int, rules: HostRules
) -> None:
    small, large = plan_of(video, units, rules), plan_of(video, units + more, rules)
    if small.verdict == "fits" and [p.batched for p in small.phases] == [p.batched for p in large.phases]:
        assert large.verdict == "fits"


@given(video=VIDEOS, units=CARDS, more=st.integers(1, 4_000), rules=HOSTS)
@settings(max_examples=200, deadline=None)
def test_a_phase_of_equal_choices_is_never_short_of_more_on_a_larger_card(
    video: dict[str, int], units: int, more: int, rules: HostRules
) -> None:
    small, large = plan_of(video, units, rules), plan_of(video, units + more, rules)
    for before, after in zip(small.phases, large.phases, strict=True):
        if choices(before) == choices(after):
            assert after.short <= before.short


# more video


@given(video=VIDEOS, more=MORE, rules=HOSTS, tile=st.none() | st.integers(2, 64).map(lambda steps: 32 * steps))
@settings(max_examples=200, deadline=None)
def test_more_frames_pixels_or_videos_never_lower_a_peak(
    video: dict[str, int], more: dict[str, int], rules: HostRules, tile: int | None
) -> None:
    small = plan_of(video, AMPLE, rules, tile)
    large = plan_of({name: value + more[name] for name, value in video.items()}, AMPLE, rules, tile)
    assert small.runs
    assert large.runs
    for before, after in zip(small.phases, large.phases, strict=True):
        if choices(before) == choices(after):
            assert_no_less(before.peak, after.peak)
            assert_no_less(before.activation, after.activation)


@given(video=VIDEOS, rules=HOSTS, steps=st.integers(2, 60), more=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_larger_tiles_never_take_less(video: dict[str, int], rules: HostRules, steps: int, more: int) -> None:
    small, large = (plan_of(video, AMPLE, rules, 32 * size).phases[-1] for size in (steps, steps + more))
    assert_no_less(small.activation, large.activation)


def assert_no_less(before: Estimate | None, after: Estimate | None) -> None:
    assert before is not None
    assert after is not None
    assert before.lower <= after.lower
    assert before.expected <= after.expected
    assert before.upper <= after.upper
