"""Fixes keep their promise: each is a plan of the graph with it, the largest that fits, and no more than is needed."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import planlab
import pytest
from host.checkpoints import write_official_models
from hypothesis import given, settings
from hypothesis import strategies as st
from planlab import RULES, UNIT, node
from test_wrapper_graphs import WRAPPER, wrapper_prompt
from vram_headroom.vram.estimate.checkpoint import Checkpoint, read_checkpoint
from vram_headroom.vram.plan.advice import (
    CARD_SIZES,
    MAX_REPLANS,
    MAX_REPLANS_WHEN_IT_RUNS,
    Context,
    Fix,
    advise,
    fix_report,
)
from vram_headroom.vram.plan.bench import PICTURES, Setup
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.knobs import smaller_sizes
from vram_headroom.vram.plan.patch import ReplaceNode, SetInput, apply
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.ram import SystemMemory
from vram_headroom.vram.plan.siblings import name_words, smaller_siblings
from vram_headroom.vram.plan.types import Card, HostRules, Library, MissingFileError, ModelRef, NodeSpec, Plan

GIB = 1 << 30

VOCABULARY = {
    **planlab.VOCABULARY,
    **WRAPPER,
    "VRAMHeadroomLoadDiffusionModel": planlab.VOCABULARY["UNETLoader"],
    "VAEDecodeTiled": NodeSpec(
        {
            "samples": "LATENT",
            "vae": "VAE",
            "tile_size": "INT",
            "overlap": "INT",
            "temporal_size": "INT",
            "temporal_overlap": "INT",
        },
        ("IMAGE",),
    ),
}


WIDE = {
    f"{noise}_noise.safetensors": planlab.wan_dit(f"/m/{noise}_noise.safetensors", 6000, dim=5120) for noise in ("high", "low")
}
"""The experts with the width of the real ones: sampling needs about as much as decoding."""

WIDE["five.safetensors"] = planlab.wan_dit("/m/five.safetensors", 100, dim=3072, out=48)


def wide_library(folder: str, name: str) -> Checkpoint:
    return WIDE.get(name) or planlab.library(folder, name)


@dataclass
class Host:
    """The real planner for one prompt on one card, as a host would hand it to `advise`; counts the plans it makes."""

    prompt: dict[str, Any]
    card: Card
    rules: HostRules = RULES
    library: Library = wide_library
    memory: SystemMemory | None = None
    made: int = field(default=0)

    def replan(self, prompt: Mapping[str, Any], card: Card | None = None, rules: HostRules | None = None) -> Plan:
        self.made += 1
        card, rules = card or self.card, rules or self.rules
        chain = build_chain(dict(prompt), VOCABULARY, self.library, rules, card)
        return make_plan(chain, card, rules, memory=self.memory)

    def plan(self) -> Plan:
        return self.replan(self.prompt)

    def context(self, **fields: Any) -> Context:
        known = Context(
            VOCABULARY,
            library=self.library,
            rules=self.rules,
            replan_with=lambda rules: self.replan(self.prompt, rules=rules),
            replan_on=lambda card: self.replan(self.prompt, card),
        )
        return replace(known, **fields)

    def advice(self, **fields: Any) -> tuple[Fix, ...]:
        plan = self.plan()
        self.made = 0
        return advise(self.prompt, plan, self.replan, self.context(**fields))


REAL = HostRules()
"""Keeps as much for a forward as ComfyUI does: small ones fit beside weights."""


def host(units: int, rules: HostRules = RULES, **latent: Any) -> Host:
    return Host(planlab.two_experts(**latent), planlab.card(units), rules)


def by_id(fixes: tuple[Fix, ...]) -> dict[str, Fix]:
    return {fix.id: fix for fix in fixes}


def set_values(fix: Fix) -> dict[tuple[str, str], object]:
    return {(change.node_id, change.input): change.value for change in fix.changes if isinstance(change, SetInput)}


def whole_values(fix: Fix) -> dict[tuple[str, str], int]:
    return {key: value for key, value in set_values(fix).items() if isinstance(value, int)}


def a_card_between(small: int, large: int, good: Callable[[int], bool]) -> int:
    """The smallest card, in UNITs, for which `good` holds: sizes come from the planner, never from a number here."""
    while small < large:
        middle = (small + large) // 2
        small, large = (small, middle) if good(middle) else (middle + 1, large)
    return small


def least_card(**latent: Any) -> int:
    """The smallest card the two-expert graph runs on."""
    return a_card_between(1, 200_000, lambda units: host(units, **latent).plan().runs)


# the promise

CARDS = st.integers(1, 14_000)
LATENTS = st.fixed_dictionaries(
    {
        "width": st.sampled_from([480, 640, 832, 1280, 1000]),
        "height": st.sampled_from([480, 640, 720, 1280]),
        "length": st.sampled_from([1, 5, 33, 80, 81, 121, 257]),
        "batch_size": st.sampled_from([1, 1, 3]),
    }
)
HOSTS = st.builds(
    HostRules,
    patchers=st.sampled_from(["legacy", "dynamic"]),
    vram_state=st.sampled_from(["NORMAL_VRAM", "HIGH_VRAM", "LOW_VRAM", "NO_VRAM"]),
    reserve_bytes=st.sampled_from([0, 400 * UNIT, 4000 * UNIT]),
    minimum_inference_bytes=st.sampled_from([0, 1200 * UNIT]),
    flash_attention=st.booleans(),
    vae_compute_bytes=st.sampled_from([2, 4]),
)


MEMORIES = st.none() | st.builds(
    lambda available, swap: SystemMemory(32 * GIB, available * GIB, swap_free=swap * GIB),
    st.integers(1, 32),
    st.sampled_from([0, 2, 16]),
)


@given(units=CARDS, latent=LATENTS, rules=HOSTS, fast=st.booleans(), linked=st.booleans(), memory=MEMORIES)
@settings(max_examples=60, deadline=None)
def test_every_fix_applied_gives_exactly_the_plan_it_promised(
    units: int, latent: dict[str, int], rules: HostRules, fast: bool, linked: bool, memory: SystemMemory | None
) -> None:
    prompt = planlab.two_experts(fast, **latent)
    if linked:
        prompt["frames"] = node("PrimitiveInt", value=latent["length"])
        prompt["74"]["inputs"]["length"] = ["frames", 0]
    here = Host(prompt, planlab.card(units), rules, memory=memory)
    before, plan = copy.deepcopy(prompt), here.plan()
    fixes = here.advice()
    assert prompt == before
    assert here.made <= MAX_REPLANS
    assert fixes == here.advice(), "the same question has the same answer"
    for fix in fixes:
        assert fix.verdict == fix.plan.verdict
        assert fix.plan.runs or fix.id == "larger_card"
        if memory is not None and fix.plan.ram is not None and fix.plan.ram.verdict != "fits":
            assert fix.plan.ram.message in fix.note, "what else is short is said"
        if ends(fix.plan):
            assert ends(plan), "no fix makes system memory too small"
        if fix.changes:
            assert here.replan(apply(prompt, fix.changes)) == fix.plan
    places = [PICTURES.index(fix.picture) for fix in fixes]
    assert places == sorted(places), "what leaves the picture as it is comes first"
    assert len({fix.id for fix in fixes}) == len(fixes)
    if plan.verdict == "does_not_fit":
        assert fixes, "there is always an answer, if only that there is none"
        assert all(fix.saves > 0 for fix in fixes if fix.changes)


def ends(plan: Plan) -> bool:
    return plan.ram is not None and plan.ram.verdict == "does_not_fit"


def test_what_fits_or_is_unknown_needs_no_advice() -> None:
    assert host(100_000).plan().verdict == "fits"
    assert host(100_000).advice() == ()
    unknown = host(100_000)
    unknown.prompt["75"] = node("MagicModelMaker", seed=1)
    assert unknown.plan().verdict == "unknown"
    assert unknown.advice() == ()


def test_a_prompt_that_is_none_has_no_fixes() -> None:
    here = host(least_card() - 1)
    plan = here.plan()
    assert advise({}, plan, here.replan, here.context()) == ()
    loop = {"1": node("VAEDecode", samples=("1", 0)), "2": node("SaveVideo", images=("1", 0))}
    assert advise(loop, plan, here.replan, here.context()) == ()


JUNK = st.sampled_from([None, True, -1, 0, 10**400, 1e308, "x", "", [], {}, ["74", 0], ["74", 10**9], {"__value__": [1]}, 4096])


@given(data=st.data(), units=CARDS)
@settings(max_examples=120, deadline=None)
def test_no_prompt_makes_advice_raise(data: st.DataObject, units: int) -> None:
    prompt = planlab.two_experts(width=1280, height=720)
    prompt["swap"] = node("WanVideoBlockSwap", blocks_to_swap=2)
    prompt["86"]["inputs"]["swap"] = ["swap", 0]
    for _ in range(data.draw(st.integers(1, 4))):
        where = prompt[data.draw(st.sampled_from(sorted(prompt)))]
        if data.draw(st.integers(0, 9)) == 0:
            where.pop(data.draw(st.sampled_from(["class_type", "inputs"])), None)
        elif where.get("inputs"):
            where["inputs"][data.draw(st.sampled_from(sorted(where["inputs"])))] = data.draw(JUNK)
    here = Host(prompt, planlab.card(units))
    try:
        here.plan()
    except ValueError:
        return
    for fix in here.advice(files=lambda folder: ["x", "high_noise_fp8.safetensors"]):
        if fix.changes:
            assert here.replan(apply(prompt, fix.changes)) == fix.plan


def test_a_replan_that_fails_is_no_fix() -> None:
    here = host(least_card() - 1)
    plan = here.plan()

    def replan(prompt: Mapping[str, Any]) -> Plan:
        raise ValueError("length must be 81")

    fixes = advise(here.prompt, plan, replan, replace(here.context(), replan_on=None, replan_with=None))
    assert [fix.id for fix in fixes] == ["larger_card"]


# solved, not listed


def test_the_clip_is_the_longest_of_4n_plus_1_frames_that_fits() -> None:
    # a shorter clip helps where sampling is what is short: the decode is tiled already
    here = sampling_short()
    fix = by_id(here.advice())["shorter_video"]
    frames = set_values(fix)["74", "length"]
    assert isinstance(frames, int)
    assert frames % 4 == 1
    assert frames < 81
    assert fix.title == f"Make the video {frames} frames long instead of 81"
    assert fix.picture == "shorter"
    assert not here.replan(apply(here.prompt, [SetInput("74", "length", frames + 4)])).runs


def sampling_short(spare: int = -300) -> Host:
    """Two experts whose sampling is `spare` UNITs from fitting, at a tile whose decode is not."""
    prompt = planlab.two_experts(width=1280, height=720)
    prompt["87"] = node("VAEDecodeTiled", samples=("78", 0), vae=("73", 0), tile_size=64, overlap=32)
    least = a_card_between(1, 200_000, lambda units: Host(prompt, planlab.card(units)).plan().runs)
    return Host(prompt, planlab.card(least + spare))


def test_the_size_is_the_largest_of_nearly_the_same_shape_that_fits() -> None:
    here = sampling_short()
    fix = by_id(here.advice())["smaller_video"]
    values = whole_values(fix)
    size = (values["74", "width"], values["74", "height"])
    sizes = smaller_sizes(1280, 720, 16)
    assert size in sizes
    larger = sizes[: sizes.index(size)]
    assert not any(
        here.replan(apply(here.prompt, [SetInput("74", "width", w), SetInput("74", "height", h)])).runs for w, h in larger
    )


@given(width=st.integers(256, 4096), height=st.integers(256, 4096), grid=st.sampled_from([16, 32]))
@settings(max_examples=100, deadline=None)
def test_smaller_sizes_are_on_the_grid_near_the_shape_and_ever_smaller(width: int, height: int, grid: int) -> None:
    last = (width, height)
    for size in smaller_sizes(width, height, grid):
        assert size[0] % grid == size[1] % grid == 0
        assert size[0] * height / (size[1] * width) == pytest.approx(1, abs=0.021)
        assert min(size) < min(last)
        assert max(size) <= max(last) + grid
        last = size


def test_a_model_of_16_pixel_cells_gets_sizes_in_steps_of_32() -> None:
    prompt = planlab.two_experts(width=1280, height=704, length=121)
    del prompt["73"]
    for loader in ("75", "76"):
        prompt[loader]["inputs"]["unet_name"] = "five.safetensors"
    prompt["87"] = node("KSampler", model=("75", 0), latent_image=("78", 0), steps=2, cfg=1.0)
    prompt["80"] = node("SaveVideo", images=("87", 0))
    least = a_card_between(1, 200_000, lambda units: Host(prompt, planlab.card(units)).plan().runs)
    values = set_values(by_id(Host(prompt, planlab.card(least - 50)).advice())["smaller_video"])
    assert all(isinstance(side, int) and side % 32 == 0 for side in values.values())


def decode_short(missing: int = 60, **inputs: Any) -> Host:
    """A latent that is only decoded, on a card too small by `missing` UNITs: for the tiles that ComfyUI falls back to, or for
    those that `inputs` ask for."""
    prompt = {
        "73": node("VAELoader", vae_name="vae.safetensors"),
        "78": node("EmptyHunyuanLatentVideo", width=1280, height=720, length=81, batch_size=1),
        "87": node("VAEDecodeTiled" if inputs else "VAEDecode", samples=("78", 0), vae=("73", 0), **inputs),
        "80": node("SaveVideo", images=("87", 0)),
    }
    here = Host(prompt, planlab.card(0))
    least = a_card_between(1, 200_000, lambda units: here.replan(prompt, planlab.card(units)).runs)
    here.card = planlab.card(least - missing)
    assert not here.plan().runs
    return here


def test_the_decode_is_tiled_with_the_largest_tile_that_fits_and_keeps_its_links() -> None:
    here = decode_short()
    fix = by_id(here.advice())["tiled_decode"]
    (change,) = fix.changes
    assert isinstance(change, ReplaceNode)
    assert change.class_type == "VAEDecodeTiled"
    assert (change.inputs["samples"], change.inputs["vae"]) == (["78", 0], ["73", 0])
    tile = change.inputs["tile_size"]
    assert isinstance(tile, int)
    assert tile % 32 == 0
    assert change.inputs["temporal_size"] == 84, "the clip is not cut in time: 81 frames are 21 latent frames of 4"
    larger = ReplaceNode("87", "VAEDecodeTiled", {**change.inputs, "tile_size": tile + 32})
    assert not here.replan(apply(here.prompt, [larger])).runs
    assert fix.title == f"Decode the video in tiles of {tile} px"
    fallback = here.plan().phases[0].tiled
    assert fallback is not None
    assert 64 <= tile < fallback.size == 256
    assert "tiles instead of 28" in fix.cost


def test_tiles_instead_of_one_pass_are_counted_where_they_begin() -> None:
    here = wrapper_decoding_short()
    tile = whole_values(by_id(here.advice())["tiled_decode"])["7", "tile_x"]
    across, down = (len(range(0, side - tile // 2, tile - tile // 2)) for side in (1280, 720))
    assert f"{across * down} tiles instead of one pass" in by_id(here.advice())["tiled_decode"].cost


def test_tiles_that_are_there_get_smaller() -> None:
    here = decode_short(1, tile_size=640, overlap=64)
    assert set_values(by_id(here.advice())["tiled_decode"]) == {("87", "tile_size"): 608}
    wide = by_id(decode_short(1, tile_size=640, overlap=160).advice())["tiled_decode"]
    assert set_values(wide) == {("87", "tile_size"): 608, ("87", "overlap"): 64}, "at most a quarter of the tile overlaps"


def test_where_the_host_has_no_tiled_decode_none_is_advised() -> None:
    assert "tiled_decode" in by_id(decode_short().advice())
    assert "tiled_decode" not in by_id(decode_short().advice(vocabulary=planlab.VOCABULARY))


def test_fewer_videos_at_once_are_as_many_as_fit() -> None:
    prompt = sampling_short().prompt
    prompt["74"]["inputs"]["batch_size"] = 4
    fits_two = a_card_between(
        1, 200_000, lambda units: Host(apply(prompt, [SetInput("74", "batch_size", 2)]), planlab.card(units)).plan().runs
    )
    fix = by_id(Host(prompt, planlab.card(fits_two)).advice())["smaller_batch"]
    assert set_values(fix) == {("74", "batch_size"): 2}
    assert (fix.picture, fix.title) == ("fewer", "Make 2 videos at a time instead of 4")


def test_a_value_that_comes_from_a_link_is_changed_where_it_comes_from() -> None:
    here = sampling_short()
    here.prompt["seconds"] = node("PrimitiveFloat", value=5.0)
    here.prompt["sum"] = node("ComfyMathExpression", **{"expression": "floor(a * 16) + 1", "values.a": ("seconds", 0)})
    here.prompt["74"]["inputs"]["length"] = ["sum", 1]
    fix = by_id(here.advice())["shorter_video"]
    assert list(set_values(fix)) == [("seconds", "value")]
    assert here.replan(apply(here.prompt, fix.changes)) == fix.plan
    here.prompt["74"]["inputs"]["length"] = ["x", 0]
    here.prompt["x"] = node("RandomSize", seed=1)
    assert "shorter_video" not in by_id(here.advice())


# several at once


def smaller_than_any_one_fix() -> Host:
    """A card that no single change is enough for: sampling is short by much, and so is the smallest text encoding."""
    full = least_card(width=1280, height=720, length=257)
    for part in range(60, 0, -1):
        here = host(full * part // 600, width=1280, height=720, length=257)
        fixes = here.advice()
        if fixes and all("+" in fix.id for fix in fixes):
            return here
    raise AssertionError("one change is enough on every card")


def test_where_one_change_is_not_enough_several_are_offered_and_each_is_needed() -> None:
    here = smaller_than_any_one_fix()
    for fix in here.advice():
        assert fix.plan.runs
        assert "+" in fix.id
        # taken by node, any part left out is missed
        for node_id in {change.node_id for change in fix.changes}:
            rest = [change for change in fix.changes if change.node_id != node_id]
            assert not here.replan(apply(here.prompt, rest)).runs, (fix.title, node_id)


def assert_as_mild_as_can_be(here: Host, fix: Fix) -> None:
    """No part of the fix can be left out, nor be a step milder."""
    parts = [{"device"}, {"length"}, {"width", "height"}, {"batch_size"}, {"blocks_to_swap"}]
    for part in parts:
        rest = [change for change in fix.changes if not (isinstance(change, SetInput) and change.input in part)]
        assert len(rest) == len(fix.changes) or not here.replan(apply(here.prompt, rest)).runs, (fix.title, part)
    for change in fix.changes:
        rest = [other for other in fix.changes if other is not change]
        if isinstance(change, ReplaceNode):
            assert not here.replan(apply(here.prompt, rest)).runs, (fix.title, change)
        elif change.input in ("length", "batch_size") and isinstance(change.value, int):
            milder = replace(change, value=change.value + {"length": 4, "batch_size": 1}[change.input])
            assert not here.replan(apply(here.prompt, [*rest, milder])).runs, (fix.title, change)


def test_where_even_three_changes_are_not_enough_all_that_are_needed_are_offered_and_no_others() -> None:
    most = 0
    # cards on which even encoding the text is too much, and eight long videos by far
    for units, side in itertools.product((420, 450, 550, 600), (480, 640)):
        here = host(units, REAL, width=side, height=side, length=257, batch_size=8)
        here.prompt["swap"] = node("WanVideoBlockSwap", blocks_to_swap=2)
        for fix in here.advice():
            most = max(most, fix.id.count("+") + 1)
            assert "swap_blocks" not in fix.id, "nothing here depends on it"
            if fix.changes:
                assert_as_mild_as_can_be(here, fix)
    assert most > 3


def test_a_combination_is_offered_beside_one_change_only_where_it_spares_the_picture() -> None:
    # a clip of four latent frames is cheap to decode, so one that short needs no tiles; with tiles it can be longer
    spared = 0
    full = least_card(width=1280, height=720, length=161)
    for part in range(2, 12):
        fixes = by_id(host(full * part // 12, width=1280, height=720, length=161).advice())
        for name, fix in fixes.items():
            if "+" in name and (alone := fixes.get(name.rsplit("+", 1)[1])):
                was, now = whole_values(alone), whole_values(fix)
                assert all(now[key] >= value for key, value in was.items())
                assert now != was
                spared += 1
    assert spared


# nothing helps


def tiny() -> Host:
    """Needs more than any change could save: one frame of the smallest size is asked already."""
    here = host(1, width=256, height=256, length=5)
    here.prompt["87"] = node("KSampler", model=("75", 0), latent_image=("78", 0), steps=2, cfg=1.0)
    here.prompt["80"] = node("SaveVideo", images=("87", 0))
    return here


def test_nothing_short_of_a_larger_card_is_said_with_the_smallest_that_would_do() -> None:
    here = tiny()
    (fix,) = here.advice()
    assert fix.id == "larger_card"
    assert fix.changes == ()
    assert fix.title == f"Nothing short of a larger card: one of {CARD_SIZES[0] // GIB} GB would do"
    assert fix.plan.runs
    assert fix.plan.card.total == CARD_SIZES[0]


def test_the_larger_card_is_the_smallest_on_sale_and_other_programs_stay_on_it() -> None:
    here = host(1, width=1280, height=720)
    for loader in ("87", "80", "74"):
        assert loader in here.prompt
    fixed = replace(here.context(), vocabulary=planlab.VOCABULARY)
    here.prompt["74"]["inputs"].update(width=["x", 0], height=["y", 0], length=["z", 0])
    here.prompt |= {
        name: node("ComfyMathExpression", **{"expression": f"{value} + 0 * a", "values.a": 1})
        for name, value in (("x", 1280), ("y", 720), ("z", 81))
    }
    for side, name in (("width", "x"), ("height", "y"), ("length", "z")):
        here.prompt["74"]["inputs"][side] = [name, 1]
    here.prompt["71"]["inputs"]["device"] = "cpu"
    here.card = Card("8 GB", 8 * GIB, 1 * GIB)
    plan = here.plan()
    assert plan.verdict == "does_not_fit"
    (fix,) = advise(here.prompt, plan, here.replan, fixed)
    assert fix.id == "larger_card"
    needed = a_card_between(1, 300 * 1024, lambda units: here.replan(here.prompt, planlab.card(units)).runs) * UNIT
    assert fix.plan.card.total == min(size for size in CARD_SIZES if size - 7 * GIB >= needed)


def test_without_other_cards_to_plan_on_no_size_is_told() -> None:
    here = tiny()
    (fix,) = here.advice(replan_on=None)
    assert (fix.title, fix.verdict, fix.plan) == ("Nothing short of a larger card", "does_not_fit", here.plan())


# around the graph


def test_a_launch_flag_is_advised_in_words_with_the_plan_under_it_and_only_where_it_helps() -> None:
    keeping = replace(RULES, gpu_only=True)
    here = host(3 * least_card(), keeping)
    assert here.plan().verdict == "does_not_fit", "no model has anywhere to go"
    fix = here.advice()[0]
    assert (fix.id, fix.changes, fix.picture) == ("flag_no_highvram", (), "nothing")
    assert "without --highvram and --gpu-only" in fix.title
    assert fix.plan == here.replan(here.prompt, rules=RULES)
    assert not any("novram" in fix.id for fix in here.advice()), "it makes no room where models have nowhere to go"
    assert not any(fix.id.startswith("flag") for fix in here.advice(replan_with=None))


def test_a_host_that_makes_room_for_slow_attention_streams_for_nothing() -> None:
    slow = replace(RULES, flash_attention=False)
    here = Host(planlab.two_experts(width=1280, height=720), planlab.card(50_000), slow)
    assert here.plan().verdict == "fits_with_offload"
    fix = here.advice()[0]
    assert (fix.id, fix.verdict) == ("flag_pytorch_attention", "fits")
    assert "--use-pytorch-cross-attention" in fix.title
    assert fix.plan == here.replan(here.prompt, rules=RULES)


def test_flags_that_make_a_card_stream_for_nothing_are_advised_against() -> None:
    least = least_card()
    here = host(4 * least, replace(RULES, vram_state="NO_VRAM"))
    assert here.plan().verdict == "fits_with_offload"
    fix = by_id(here.advice())["flag_no_lowvram"]
    assert fix.saves > 0
    assert fix.plan == here.replan(here.prompt, rules=replace(RULES, vram_state="NORMAL_VRAM"))


def test_other_programs_are_named_with_what_they_hold() -> None:
    least = least_card()
    here = Host(planlab.two_experts(), planlab.card(2 * least, free=least - 500))
    fix = here.advice(other_programs=600 * UNIT)[0]
    assert (fix.id, fix.picture) == ("close_other_programs", "nothing")
    assert fix.title == "Close other programs: they hold 0.6 GB of this card"
    assert "close_other_programs" not in by_id(here.advice(other_programs=100 * UNIT)), "that is not enough"


def test_a_change_of_policy_is_a_fix_where_it_helps() -> None:
    here = host(least_card() - 1)
    larger = planlab.card(2 * least_card())
    unpin = Setup("unpin_vae", "Unpin the VAE", "nothing", lambda: here.replan(here.prompt, larger))
    idle = Setup("nothing", "Change nothing", "nothing", here.plan)
    found = by_id(here.advice(policies=(unpin, idle)))
    assert found["unpin_vae"].plan.card == larger
    assert "nothing" not in found


# what runs already


@given(units=CARDS, rules=HOSTS)
@settings(max_examples=40, deadline=None)
def test_what_runs_already_is_only_advised_to_run_faster_with_the_same_picture(units: int, rules: HostRules) -> None:
    here = host(units, rules)
    if here.plan().verdict != "fits_with_offload":
        return
    fixes = here.advice()
    assert here.made <= MAX_REPLANS_WHEN_IT_RUNS
    assert len(fixes) <= 3
    for fix in fixes:
        assert fix.picture == ("tiled" if fix.id == "tiled_decode" else "nothing")
        assert fix.plan.runs
        assert fix.saves > 0 or failing(fix.plan) < failing(here.plan())


def failing(plan: Plan) -> int:
    """Phases that run out of memory before they are done in tiles."""
    return sum(planned.tiled is not None for planned in plan.phases)


def test_a_decode_that_fails_before_it_is_tiled_gets_the_largest_tiles_from_the_start() -> None:
    here = Host(planlab.two_experts(), planlab.card(2500), library=planlab.library)
    plan = here.plan()
    assert plan.verdict == "fits_with_offload"
    assert (failing(plan), plan.phases[-1].tiled is not None) == (1, True)
    fix = by_id(here.advice())["tiled_decode"]
    (change,) = fix.changes
    assert isinstance(change, ReplaceNode)
    tile = change.inputs["tile_size"]
    assert isinstance(tile, int)
    assert tile > 256, "ComfyUI's own are smaller"
    assert (fix.picture, failing(fix.plan)) == ("tiled", 0)
    assert fix.cost.startswith("no first attempt that runs out of memory; 4 tiles instead of 9")
    assert here.replan(apply(here.prompt, fix.changes)) == fix.plan
    larger = ReplaceNode("87", "VAEDecodeTiled", {**change.inputs, "tile_size": tile + 32})
    assert not here.replan(apply(here.prompt, [larger])).runs
    assert "tiled_decode" not in by_id(here.advice(vocabulary=planlab.VOCABULARY))
    whole = Host(here.prompt, planlab.card(5000), library=planlab.library)
    assert whole.plan().verdict == "fits_with_offload"
    assert "tiled_decode" not in by_id(whole.advice()), "it decodes whole"


# WanVideoWrapper


def block_swapper(units: int, blocks: int, **size: int) -> Host:
    prompt = wrapper_prompt(**{"10": node("WanVideoBlockSwap", blocks_to_swap=blocks)})
    prompt["1"]["inputs"]["block_swap_args"] = ["10", 0]
    prompt["5"]["inputs"].update(size)
    return Host(prompt, planlab.card(units), library=planlab.library)


def wrapper_decoding_short() -> Host:
    """So many blocks are swapped that decoding needs more than sampling."""
    least = a_card_between(1, 200_000, lambda units: block_swapper(units, 48, width=1280, height=720).plan().runs)
    here = block_swapper(least - 100, 48, width=1280, height=720)
    assert [planned.phase.kind for planned in here.plan().phases if planned.short] == ["vae_decode"]
    return here


def test_the_wrappers_own_tiles_are_switched_on() -> None:
    here = wrapper_decoding_short()
    fix = by_id(here.advice())["tiled_decode"]
    values = set_values(fix)
    tile = whole_values(fix)["7", "tile_x"]
    assert values["7", "enable_vae_tiling"] is True
    assert values["7", "tile_y"] == tile
    assert values["7", "tile_stride_x"] == values["7", "tile_stride_y"] == tile // 2
    assert fix.plan == here.replan(apply(here.prompt, fix.changes))
    larger = [SetInput("7", "tile_x", tile + 32), SetInput("7", "enable_vae_tiling", True)]
    assert tile == 1248 or not here.replan(apply(here.prompt, larger)).runs


def test_as_few_blocks_are_swapped_as_fit_and_fewer_where_too_many_are() -> None:
    full = a_card_between(1, 200_000, lambda units: block_swapper(units, 40).plan().runs)
    assert not block_swapper(full, 39).plan().runs
    units = full + 1000
    more = by_id(block_swapper(units, 2).advice())["swap_blocks"]
    blocks = set_values(more)["10", "blocks_to_swap"]
    assert isinstance(blocks, int)
    assert 2 < blocks < 40
    assert block_swapper(units, blocks).plan().runs
    assert not block_swapper(units, blocks - 1).plan().runs
    fewer = by_id(block_swapper(units, 40).advice())["swap_fewer_blocks"]
    assert set_values(fewer) == {("10", "blocks_to_swap"): blocks}
    assert fewer.picture == "nothing"
    assert fewer.saves > 0
    most = by_id(block_swapper(2, 2).advice())
    assert "swap_blocks" not in most, "nothing there is enough"


def test_no_more_blocks_are_swapped_than_the_model_has() -> None:
    """30 layers of 64 UNITs are what a model of 1920 has."""
    library = {"high_noise.safetensors": planlab.wan_dit("/m/high_noise.safetensors", 1920)}
    here = block_swapper(1, 2)
    here.library = lambda folder, name: library.get(name) or planlab.library(folder, name)
    all_of_them = apply(here.prompt, [SetInput("10", "blocks_to_swap", 30)])
    least = a_card_between(1, 200_000, lambda units: here.replan(all_of_them, planlab.card(units)).runs)
    here.card = planlab.card(least)
    fixes = by_id(here.advice())
    blocks = whole_values(fixes["swap_blocks"])["10", "blocks_to_swap"]
    assert 2 < blocks <= 30


# other files, other places


def test_files_of_one_model_are_known_by_the_words_of_their_names() -> None:
    same = [
        "wan2.2_t2v_high_noise_14B_fp16.safetensors",
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "sub/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf",
        "wan2.2_t2v_high_noise_14B_Q8_0.gguf",
        "wan2.2_t2v_high_noise_14B_bf16.sft",
    ]
    assert len({name_words(name) for name in same}) == 1
    others = [
        "wan2.2_t2v_low_noise_14B_fp16.safetensors",
        "wan2.2_i2v_high_noise_14B_fp16.safetensors",
        "wan2.1_t2v_high_noise_14B_fp16.safetensors",
        "wan2.2_t2v_high_noise_14B_lightning_fp16.safetensors",
        "wan2.2_t2v_high_noise_5B_fp16.safetensors",
        "wan2.2_t2v_high_noise_14B_v2_fp16.safetensors",
    ]
    assert len({name_words(name) for name in (same[0], *others)}) == 1 + len(others)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official files of 14B, and two that have a sibling's name and another model in them."""
    folder = tmp_path_factory.mktemp("models")
    names = [f"wan2.2_t2v_{noise}_noise_14B_{kind}" for noise in ("high", "low") for kind in ("fp16", "fp8_scaled")]
    names += ["wan2.2_i2v_high_noise_14B_fp8_scaled", "wan2.1_t2v_1.3B_fp16", "umt5_xxl_fp16", "umt5_xxl_fp8_e4m3fn_scaled"]
    write_official_models(folder, [*names, "wan_2.1_vae"])
    models = folder / "diffusion_models"
    (models / "wan2.1_t2v_1.3B_fp16.safetensors").rename(models / "wan2.2_t2v_high_noise_14B_fp8.safetensors")
    (models / "wan2.2_t2v_low_noise_14B_int8.safetensors").write_bytes(b"no header")
    return folder


def library_of(folder: Path) -> Library:
    kept: dict[Path, Checkpoint] = {}

    def library(kind: str, name: str) -> Checkpoint:
        path = folder / kind / name
        if path not in kept:
            if not path.is_file():
                raise MissingFileError(f"{name} is not in models/{kind}")
            kept[path] = read_checkpoint(path)
        return kept[path]

    return library


def files_of(folder: Path) -> Callable[[str], list[str]]:
    return lambda kind: sorted(path.name for path in (folder / kind).iterdir()) if (folder / kind).is_dir() else []


def test_a_sibling_has_the_name_and_the_weights_of_its_model(official: Path) -> None:
    library, files = library_of(official), files_of(official)
    for noise in ("high", "low"):
        name = f"wan2.2_t2v_{noise}_noise_14B_fp16.safetensors"
        bytes_of = library("diffusion_models", name).tensor_bytes
        model = ModelRef("1", "generator", name, "", bytes_of, bytes_of, "WAN")
        assert smaller_siblings(model, library, files) == (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors",)
    encoder = ModelRef("1", "text_encoder", "umt5_xxl_fp16.safetensors", "", 1, 1, "UMT5")
    assert smaller_siblings(encoder, library, files) == ("umt5_xxl_fp8_e4m3fn_scaled.safetensors",)
    smallest = ModelRef("1", "text_encoder", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "", 1, 1, "UMT5")
    assert smaller_siblings(smallest, library, files) == ()


KEEPING = replace(RULES, gpu_only=True)
"""Every model stays on the card: there smaller weights are what helps."""


def official_host(folder: Path, gib: int, precision: str = "fp16", rules: HostRules = KEEPING) -> Host:
    prompt = planlab.two_experts()
    for loader, noise in (("75", "high"), ("76", "low")):
        prompt[loader]["inputs"]["unet_name"] = f"wan2.2_t2v_{noise}_noise_14B_{precision}.safetensors"
    prompt["71"]["inputs"]["clip_name"] = "umt5_xxl_fp16.safetensors"
    prompt["73"]["inputs"]["vae_name"] = "wan_2.1_vae.safetensors"
    del prompt["83"]
    prompt["120"]["inputs"]["on_true"] = ["75", 0]
    return Host(prompt, planlab.card(gib * 1024), rules, library=library_of(folder))


def test_both_experts_are_swapped_for_the_fp8_files_that_are_there(official: Path) -> None:
    here = official_host(official, 60)
    fix = by_id(here.advice(files=files_of(official)))["smaller_file"]
    assert set_values(fix) == {
        ("75", "unet_name"): "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        ("76", "unet_name"): "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    }
    assert fix.picture == "lower_precision"
    assert here.replan(apply(here.prompt, fix.changes)) == fix.plan
    assert "smaller_file" not in by_id(here.advice(files=lambda folder: []))
    assert "smaller_file" not in by_id(here.advice())


def test_weights_can_be_cast_to_fp8_where_no_smaller_file_is_there(official: Path) -> None:
    here = official_host(official, 60)
    fix = by_id(here.advice(files=lambda folder: []))["fp8_weights"]
    assert set(set_values(fix).items()) == {((loader, "weight_dtype"), "fp8_e4m3fn") for loader in ("75", "76")}
    assert "fp8_weights" not in by_id(official_host(official, 12, "fp8_scaled").advice()), "those are fp8 already"


def test_a_gguf_file_comes_with_the_loader_that_reads_it(official: Path) -> None:
    plain = library_of(official)
    names = {f"Wan2.2-T2V-A14B-{noise.title()}Noise-Q8_0.gguf": noise for noise in ("high", "low")}

    def library(kind: str, name: str) -> Checkpoint:
        return plain(kind, f"wan2.2_t2v_{names[name]}_noise_14B_fp8_scaled.safetensors" if name in names else name)

    here = official_host(official, 60)
    here.library = library
    fix = by_id(here.advice(files=lambda folder: list(names)))["smaller_file"]
    assert {change.node_id: change for change in fix.changes} == {
        loader: ReplaceNode(loader, "UnetLoaderGGUF", {"unet_name": name})
        for loader, name in zip(("75", "76"), names, strict=True)
    }
    for loader in ("75", "76"):
        here.prompt[loader] = {**here.prompt[loader], "class_type": "VRAMHeadroomLoadDiffusionModel"}
    assert by_id(here.advice(files=lambda folder: list(names)))["smaller_file"].changes == fix.changes, "ours give way too"
    stock = {name: spec for name, spec in VOCABULARY.items() if name != "UnetLoaderGGUF"}
    assert "smaller_file" not in by_id(here.advice(files=lambda folder: list(names), vocabulary=stock))


def test_the_text_encoder_goes_to_the_cpu_where_it_is_what_does_not_fit() -> None:
    # beside a small video, what its weights take on their way to a small card is more than all else
    here = host(1, REAL, width=256, height=256, length=5)
    least = a_card_between(1, 10_000, lambda units: here.replan(here.prompt, planlab.card(units)).runs)
    here.card = planlab.card(least - 1)
    assert {planned.phase.kind for planned in here.plan().phases if planned.short} == {"text_encode"}
    fix = by_id(here.advice())["text_encoder_on_cpu"]
    assert fix.picture == "slower"
    assert set_values(fix) == {("71", "device"): "cpu"}


# system memory


def with_memory(here: Host, total: int, swap: int = 0) -> Host:
    """In a machine of `total` GiB with 2 GiB taken."""
    return replace(here, memory=SystemMemory(total * GIB, (total - 2) * GIB, swap_free=swap * GIB))


def test_what_fits_the_card_and_not_the_machine_gets_smaller_files(official: Path) -> None:
    here = with_memory(official_host(official, 24, rules=RULES), 44)
    plan = here.plan()
    assert plan.runs
    assert ends(plan)
    fixes = by_id(here.advice(files=files_of(official)))
    fix = fixes["smaller_file"]
    assert set(set_values(fix).values()) == {
        f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low")
    }
    assert fix.plan.runs
    assert not ends(fix.plan)
    assert fix.plan == here.replan(apply(here.prompt, fix.changes))
    assert fix.saves > 20 * GIB
    assert fix.plan.ram is not None
    assert fix.note == fix.plan.ram.message, "it is tight still, which is said"
    assert "fp8_weights" in by_id(here.advice()), "where no file is there, weights are cast as they are loaded"


def test_tight_memory_is_advised_other_files_and_nothing_else(official: Path) -> None:
    here = with_memory(official_host(official, 24, rules=RULES), 72)
    plan = here.plan()
    assert plan.ram is not None
    assert plan.ram.verdict == "tight"
    fixes = by_id(here.advice(files=files_of(official)))
    assert here.made <= MAX_REPLANS_WHEN_IT_RUNS
    assert {"smaller_file", "fp8_weights"} <= set(fixes)
    assert {fix.picture for fix in fixes.values()} <= {"nothing", "lower_precision"}
    for fix in fixes.values():
        assert fix.plan.ram is not None
        if fix.picture == "lower_precision":
            assert fix.plan.ram.verdict == "fits"
            assert fix.saves > 0


def test_where_swapping_cannot_be_helped_half_of_it_is_worth_a_smaller_file(official: Path) -> None:
    here = with_memory(official_host(official, 12, rules=RULES), 30, swap=64)
    plan = here.plan()
    assert plan.ram is not None
    assert plan.ram.verdict == "tight"
    assert plan.ram.short > 30 * GIB
    for fix in here.advice(files=files_of(official)):
        assert fix.plan.ram is not None
        if fix.changes:
            assert fix.plan.ram.short <= plan.ram.short // 2
            assert fix.note == fix.plan.ram.message
    assert "smaller_file" in by_id(here.advice(files=files_of(official)))


def test_where_files_alone_are_not_enough_for_the_machine_several_changes_are(official: Path) -> None:
    here = with_memory(official_host(official, 24, rules=RULES), 38)
    fixes = by_id(here.advice(files=files_of(official)))
    assert "smaller_text_encoder+smaller_file" in fixes
    assert all("+" in name for name in fixes)
    assert not any(ends(fix.plan) for fix in fixes.values())


def test_where_nothing_makes_a_graph_fit_the_machine_the_missing_bytes_are_said(official: Path) -> None:
    here = with_memory(official_host(official, 24, "fp8_scaled", rules=RULES), 12, swap=1)
    (fix,) = (fix for fix in here.advice(files=files_of(official)) if fix.id == "more_memory")
    plan = here.plan()
    assert (fix.plan, fix.changes) == (plan, ())
    assert plan.ram is not None
    assert fix.title.endswith(f"{plan.ram.short / GIB:.1f} GB are missing")
    enough = replace(here, memory=SystemMemory(12 * GIB, 10 * GIB, swap_free=plan.ram.short))
    assert not ends(enough.plan()), "so large a page file would do"


def test_what_fits_neither_card_nor_machine_is_made_to_fit_both_where_it_can_be(official: Path) -> None:
    here = with_memory(official_host(official, 60), 44)
    here.rules = replace(KEEPING, free_from_list=False)
    plan = here.plan()
    assert plan.verdict == "does_not_fit"
    for fix in here.advice(files=files_of(official)):
        assert fix.plan.runs
        assert ends(plan) or not ends(fix.plan), "what frees the card must not fill the machine"


def test_a_machine_with_room_changes_no_advice() -> None:
    here = host(least_card() - 1)
    roomy = replace(here, memory=SystemMemory(512 * GIB, 500 * GIB))
    assert [(fix.id, fix.changes, fix.note) for fix in roomy.advice()] == [
        (fix.id, fix.changes, fix.note) for fix in here.advice()
    ]
    fits = replace(host(100_000), memory=SystemMemory(512 * GIB, 500 * GIB))
    assert fits.advice() == ()


# what is told


def test_no_seconds_are_told_without_a_measured_bandwidth() -> None:
    here = host(least_card() - 1)
    streaming = [fix for fix in here.advice() if "per step" in fix.cost]
    assert streaming
    assert not any(" s" in fix.cost.replace(" step", "") for fix in streaming if "tiles" not in fix.cost)
    for fix in here.advice(bus_bytes_per_second=10 * GIB):
        streamed = max(planned.streamed for planned in fix.plan.phases if planned.phase.kind == "sample")
        assert (f"{streamed / (10 * GIB):.1f} s" in fix.cost) == bool(streamed)


def test_a_fix_is_told_as_json_with_the_values_it_replaces() -> None:
    here = host(least_card() - 1)
    for fix in here.advice():
        report = json.loads(json.dumps(fix_report(here.prompt, fix)))
        assert set(report) == {
            "id",
            "title",
            "changes",
            "saves_bytes",
            "cost",
            "picture",
            "verdict",
            "message",
            "plan_id",
            "note",
        }
        assert report["plan_id"] == fix.plan.plan_id
        for change, told in zip(fix.changes, report["changes"], strict=True):
            if isinstance(change, SetInput):
                assert told["old"] == here.prompt[change.node_id]["inputs"][change.input]
                assert told["value"] == change.value
