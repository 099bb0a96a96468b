"""The replay of the host's load and evict rules, in exact bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planlab import RULES, UNIT, card, model
from replayed import compare
from vram_headroom.vram.plan.modules import Module, Parameter, castable, empty_layers, load_order
from vram_headroom.vram.plan.placing import Placed, loaded_more, shrunk, with_modules
from vram_headroom.vram.plan.residency import MOST_ORDERS, Need, Replay, Weights, starts_on_card
from vram_headroom.vram.plan.types import HeldModel, HostRules, ModelRef

RECORDED = sorted((Path(__file__).parent / "data").glob("residency-*.json"))
PROMPTS = ("t2v", "i2v", "two experts", "lora", "shared loader", "shared loader, one use with a lora")


def need(*models: ModelRef, minimum: int = 0, wanted: int | None = None) -> Need:
    return Need(models, minimum * UNIT, (minimum if wanted is None else wanted) * UNIT)


def test_a_model_that_fits_is_wholly_on_the_card() -> None:
    seen = Replay(card(100), RULES).phase(need(model("a", 60), minimum=30))
    assert (seen.resident, seen.offloaded, seen.leaving) == (60 * UNIT, 0, ())


def test_weights_leave_the_minimum_free_and_the_rest_streams() -> None:
    seen = Replay(card(100), RULES).phase(need(model("a", 90), minimum=30))
    assert (seen.resident, seen.offloaded) == (70 * UNIT, 20 * UNIT)


def test_the_reserve_and_the_inference_minimum_are_kept_free() -> None:
    rules = HostRules(reserve_bytes=10 * UNIT, minimum_inference_bytes=50 * UNIT, headroom_bytes=0)
    small = Replay(card(100), rules).phase(need(model("a", 90), minimum=5))
    assert small.resident == 50 * UNIT, "the inference minimum binds"
    large = Replay(card(100), rules).phase(need(model("a", 90), minimum=60))
    assert large.resident == 30 * UNIT, "60 of activations and 10 of reserve bind"


def test_the_second_expert_evicts_the_first_only_as_far_as_it_needs() -> None:
    replay = Replay(card(100), RULES)
    replay.phase(need(model("high", 60), minimum=10))
    second = replay.phase(need(model("low", 60), minimum=10))
    # 1.1 times 60 and 10 of activations want 76 free: 36 of high's 60 leave
    assert second.leaving == ("high",)
    assert (second.resident, second.others) == (60 * UNIT, 24 * UNIT)


def test_what_is_partly_gone_leaves_first_then_the_smallest() -> None:
    held = (
        HeldModel(None, "whole small", 10 * UNIT, 10 * UNIT),
        HeldModel(None, "whole large", 30 * UNIT, 30 * UNIT),
        HeldModel(None, "partly gone", 50 * UNIT, 20 * UNIT),
    )
    seen = Replay(card(100, free=40), RULES, held).phase(need(model("a", 60)))
    # 66 wanted, 40 free: 26 leave, 20 of them of the model that was partly gone
    assert seen.leaving == ("whole small", "partly gone")
    assert seen.others == 34 * UNIT


def test_a_loaded_file_of_the_graph_is_not_loaded_twice() -> None:
    held = (HeldModel("/m/a", "WAN21", 60 * UNIT, 60 * UNIT),)
    mine = model("a", 60)
    seen = Replay(card(100, free=40), RULES, held, (mine,)).phase(need(mine, minimum=40))
    assert (seen.resident, seen.leaving, seen.others) == (60 * UNIT, (), 0)


def test_a_model_on_the_cpu_takes_nothing() -> None:
    seen = Replay(card(100), RULES).phase(need(model("te", 90, on_card=False)))
    assert (seen.resident, seen.offloaded) == (0, 0)


def test_other_programs_and_the_margin_are_never_available() -> None:
    assert Replay(card(100, margin=10, free=70), RULES).phase(need()).available == 60 * UNIT


def test_idle_models_are_available_to_activations() -> None:
    held = (HeldModel(None, "idle", 50 * UNIT, 50 * UNIT),)
    assert Replay(card(100, free=50), RULES, held).phase(need()).available == 100 * UNIT


def test_high_vram_loads_all_and_no_vram_nothing() -> None:
    whole = Replay(card(100), replace(RULES, vram_state="HIGH_VRAM")).phase(need(model("a", 90), minimum=30))
    none = Replay(card(100), replace(RULES, vram_state="NO_VRAM")).phase(need(model("a", 90), minimum=30))
    assert (whole.resident, none.resident) == (90 * UNIT, 0)


def test_cards_that_are_not_nvidias_keep_a_share_for_weights() -> None:
    rules = replace(RULES, minimum_weight_ratio=0.4)
    assert Replay(card(100), rules).phase(need(model("a", 90), minimum=95)).resident == 40 * UNIT


def test_elastic_weights_take_what_activations_and_headroom_leave() -> None:
    rules = replace(RULES, patchers="dynamic", headroom_bytes=5 * UNIT)
    replay = Replay(card(100), rules)
    first = replay.phase(need(model("high", 90), minimum=30))
    assert (first.resident, first.offloaded) == (65 * UNIT, 25 * UNIT)
    second = replay.phase(need(model("low", 40), minimum=30))
    assert (second.resident, second.others, second.leaving) == (40 * UNIT, 25 * UNIT, ("high",))


def test_an_unused_elastic_model_never_grows() -> None:
    rules = replace(RULES, patchers="dynamic")
    replay = Replay(card(100), rules)
    replay.phase(need(model("high", 90), minimum=90))
    assert replay.phase(need(model("low", 10))).others == 10 * UNIT


def test_parts_of_one_file_are_models_of_their_own() -> None:
    parts = (model("whole", 50), model("whole", 30, role="text_encoder"), model("whole", 4, role="vae"))
    held = (HeldModel("/m/whole", "WanTEModel", 30 * UNIT, 30 * UNIT),)
    replay = Replay(card(100, free=70), RULES, held, parts)
    assert replay.phase(need(parts[1])).resident == 30 * UNIT
    sample = replay.phase(need(parts[0]))
    assert (sample.resident, sample.others, sample.leaving) == (50 * UNIT, 30 * UNIT, ())
    decode = replay.phase(need(parts[2]))
    assert (decode.resident, decode.others) == (4 * UNIT, 80 * UNIT)


def test_one_file_in_two_dtypes_is_two_models() -> None:
    replay = Replay(card(100), RULES)
    replay.phase(need(model("a", 40)))
    second = replay.phase(need(model("a", 20, options="'fp8_e4m3fn'")))
    assert (second.resident, second.others) == (20 * UNIT, 40 * UNIT)


# what real ComfyUIs were seen to do


@pytest.fixture(scope="module", params=RECORDED, ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> Any:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_both_versions_are_recorded() -> None:
    assert [path.stem for path in RECORDED] == ["residency-0.33", "residency-0.8"]


@pytest.mark.parametrize("rules", ["lab", "nvidia", "others", "low", "none", "high", "not smart"])
def test_every_load_leaves_on_the_card_what_comfyui_reported(recorded: Any, rules: str) -> None:
    seen = compare(recorded, rules)
    assert not seen.wrong, "\n".join(seen.wrong[:5])
    assert seen.loads >= 120


def test_the_lab_and_a_card_like_nvidias_are_recorded_at_ten_sizes(recorded: Any) -> None:
    for rules in ("lab", "nvidia"):
        sizes = {
            name: {run["mib"] for run in recorded["runs"] if (run["rules"], run["prompt"]) == (rules, name)} for name in PROMPTS
        }
        assert all(len(found) == 10 for found in sizes.values()), sizes


def test_few_loads_leave_anything_open(recorded: Any) -> None:
    seen = compare(recorded)
    assert seen.certain / seen.loads > 0.9


def test_modules_come_out_of_the_names_and_sizes_of_tensors(recorded: Any) -> None:
    for file, known in recorded["models"].items():
        parameters = [
            Parameter(name, size, elements, compute or None, bool(casts))
            for name, size, elements, compute, casts in known["parameters"]
        ]
        leaves = [parameter for parameter in parameters if not parameter.name.endswith(".modulation")]
        assert all(parameter.castable == castable(parameter.name) for parameter in leaves), file
        for which, modules in known["modules"].items():
            expected = [Module(size, streaming, bool(casts)) for streaming, size, casts in modules]
            found = load_order(
                parameters, known["patched"] if which == "patched" else (), empty_layers(p.name for p in parameters)
            )
            assert list(found) == expected, (file, which)


# modules


MODULES = tuple(Module(size * UNIT, size * UNIT) for size in (20, 20, 10, 5, 5))


def whole(name: str = "a", patches: str = "", modules: tuple[Module, ...] = MODULES) -> tuple[ModelRef, dict[Any, Weights]]:
    ref = model(name, sum(module.bytes for module in modules) // UNIT)
    return ref, {ref.key: Weights(modules, patches)}


def test_a_partial_load_is_a_sum_of_whole_modules_that_leaves_room_for_the_largest_to_stream() -> None:
    rules = replace(RULES, offload_streams=0)
    ref, weights = whole()
    seen = Replay(card(50), rules).phase(Need((ref,), 0, 0, weights))
    # the first stays beside a buffer of 20; with the second, or then the 10, that would be 50 and more; 5 is just below it
    assert (seen.resident, seen.buffer) == (25 * UNIT, 20 * UNIT)


def test_streams_keep_the_next_modules_on_the_card_too() -> None:
    ref, weights = whole()
    seen = Replay(card(50), replace(RULES, offload_streams=2)).phase(Need((ref,), 0, 0, weights))
    # 20 with 20 and 10 behind it makes 50 and does not fit beside itself; 5 does not fit beside a buffer of 50 either
    assert (seen.resident, seen.buffer) == (0, 50 * UNIT)


def test_what_leaves_in_part_leaves_from_the_end_of_the_load_order() -> None:
    rules = replace(RULES, offload_streams=0)
    ref, weights = whole()
    replay = Replay(card(100), rules)
    replay.phase(Need((ref,), 0, 0, weights))
    seen = replay.phase(need(model("b", 40)))
    # 44 wanted, 40 free: one module of 5 would do, but a buffer to stream it in takes 5, so that the next leaves too
    assert seen.leaving == ("a",)
    assert (seen.resident, seen.others) == (40 * UNIT, 50 * UNIT)


def test_what_leaves_a_partly_loaded_model_streams_beside_what_does_already() -> None:
    modules = (*[Module(10, 12)] * 7, *[Module(10, 10)] * 3)
    loaded = loaded_more(with_modules(Placed(model("a", 1).key, "a", 100), modules), 200, "", streams=1)
    once = shrunk(loaded, 1, streams=1)
    assert (once.loaded, once.buffer) == (70, 20)
    # half of that buffer is what is fetched ahead of the next one to go
    twice = shrunk(once, 1, streams=1)
    assert (twice.loaded, twice.buffer) == (60, 22)


def test_a_model_in_use_again_gives_way_to_larger_activations() -> None:
    replay = Replay(card(100), RULES)
    replay.phase(need(model("a", 60), minimum=10))
    seen = replay.phase(need(model("a", 60), minimum=70))
    assert (seen.resident, seen.offloaded, seen.leaving) == (30 * UNIT, 30 * UNIT, ())


def test_exchanging_loras_takes_all_weights_off_the_card_and_places_them_anew() -> None:
    ref, plain = whole()
    _, patched = whole(patches="fast")
    replay = Replay(card(100), replace(RULES, offload_streams=0))
    assert replay.phase(Need((ref,), 0, 0, plain)).resident == 60 * UNIT
    # what is there is shrunk from its end, one buffer more at a time; what is placed anew fills the room better
    assert replay.phase(Need((ref,), 50 * UNIT, 50 * UNIT, plain)).resident == 20 * UNIT
    assert replay.phase(Need((ref,), 50 * UNIT, 50 * UNIT, patched)).resident == 25 * UNIT


def test_parameters_beside_submodules_belong_to_no_module() -> None:
    parameters = [
        Parameter("blocks.0.modulation", 12, 6),
        Parameter("blocks.0.q.weight", 8, 4),
        Parameter("blocks.0.q.bias", 2, 1),
    ]
    assert load_order(parameters) == (Module(10, 10),)


def test_a_weight_with_a_lora_is_loaded_earlier_than_a_larger_one_without() -> None:
    parameters = [Parameter("a.weight", 20, 10), Parameter("b.weight", 30, 15)]
    assert load_order(parameters) == (Module(30, 30), Module(20, 20))
    assert load_order(parameters, {"a.weight"}) == (Module(20, 60), Module(30, 30))


# orders nobody can know beforehand


def three_held() -> tuple[HeldModel, ...]:
    return tuple(HeldModel(None, name, size * UNIT, size * UNIT) for name, size in (("vae", 10), ("te", 30), ("dit", 50)))


def test_models_offloaded_alike_may_leave_in_any_order_and_the_least_free_is_shown() -> None:
    seen = Replay(card(100, free=10), replace(RULES, smart_memory=True), three_held()).phase(Need((), 0, 0))
    assert seen.outcomes == (seen.after,)
    seen = Replay(card(100, free=10), RULES, three_held()).phase(need(model("new", 20), minimum=0, wanted=0))
    # 22 wanted, 10 free: 12 of te, 12 of dit, or all of vae and 2 of another
    left = {frozenset((key[0], size // UNIT) for key, size in outcome if key[0] != "/m/new") for outcome in seen.outcomes}
    te, dit, vae = (("held 1", 18), ("held 2", 38), ("held 0", 10))
    assert left == {
        frozenset({vae, te, ("held 2", 50)}),
        frozenset({vae, dit, ("held 1", 30)}),
        frozenset({("held 1", 28), ("held 2", 50)}),
        frozenset({("held 1", 30), ("held 2", 48)}),
    }
    assert seen.free == min(100 * UNIT - sum(size for _, size in outcome) for outcome in seen.outcomes)


def test_many_models_of_one_rank_stay_within_bounds() -> None:
    held = [HeldModel(None, str(index), 10 * UNIT, 10 * UNIT) for index in range(12)]
    replay = Replay(card(120, free=0), RULES, held)
    for index in range(6):
        seen = replay.phase(need(model(f"new {index}", 15)))
        assert len(seen.outcomes) <= MOST_ORDERS
        assert seen.resident == 15 * UNIT


# policies


def test_a_pinned_model_never_leaves() -> None:
    held = (HeldModel(None, "vae", 10 * UNIT, 10 * UNIT, pinned=True), HeldModel(None, "te", 60 * UNIT, 60 * UNIT))
    seen = Replay(card(100, free=30), RULES, held).phase(need(model("a", 95), minimum=20))
    assert seen.leaving == ("te",)
    assert (seen.resident, seen.others, seen.available) == (70 * UNIT, 10 * UNIT, 90 * UNIT)


def test_a_policy_pins_a_model_from_its_first_load_on() -> None:
    vae = model("vae", 10, role="vae")
    replay = Replay(card(100), RULES, pinned=[vae.key])
    replay.phase(need(vae))
    assert replay.phase(need(model("a", 95))).others == 10 * UNIT


def test_what_a_policy_sends_away_is_gone_and_comes_back_when_it_is_used() -> None:
    te = model("te", 30, role="text_encoder")
    replay = Replay(card(100), RULES)
    replay.phase(need(te))
    replay.leave([te.key])
    assert replay.free == 100 * UNIT
    assert replay.phase(need(te)).resident == 30 * UNIT


def test_models_of_a_graph_that_is_gone_are_forgotten() -> None:
    replay = Replay(card(100), RULES)
    replay.phase(need(model("old", 30)))
    replay.forget([model("old", 30).key])
    assert replay.phase(need(model("new", 90))).others == 0


# other hosts


def test_without_smart_memory_all_others_leave_wholly() -> None:
    replay = Replay(card(100), replace(RULES, smart_memory=False))
    replay.phase(need(model("a", 10)))
    seen = replay.phase(need(model("b", 10)))
    assert (seen.leaving, seen.others) == (("a",), 0)


def test_with_highvram_a_diffusion_model_that_leaves_frees_nothing() -> None:
    replay = Replay(card(100), replace(RULES, vram_state="HIGH_VRAM"))
    replay.phase(need(model("high", 60)))
    seen = replay.phase(need(model("vae", 20, role="vae"), minimum=50))
    assert (seen.resident, seen.others, seen.free) == (20 * UNIT, 60 * UNIT, 20 * UNIT)
    assert seen.available == 20 * UNIT
    assert dict(seen.after)[model("high", 60).key] == 18 * UNIT, "the host counts 42 as gone all the same"


def test_a_text_encoder_starts_on_the_card_where_its_loader_puts_it() -> None:
    gib = 1 << 30
    assert starts_on_card(6 * gib, free=16 * gib, ram_free=30 * gib, rules=RULES)
    assert not starts_on_card(6 * gib, free=7 * gib, ram_free=8 * gib, rules=RULES), "1.2 times 6 is more than 7"
    assert not starts_on_card(6 * gib, free=16 * gib, ram_free=40 * gib, rules=RULES), "system memory has more room"
    assert not starts_on_card(gib, free=16 * gib, ram_free=gib, rules=RULES), "small ones wait"
    assert not starts_on_card(6 * gib, free=16 * gib, ram_free=gib, rules=replace(RULES, patchers="dynamic"))


def test_a_full_load_places_all_weights_whatever_is_free() -> None:
    seen = Replay(card(100), RULES).phase(need(model("te", 120), minimum=90)._replace(full_load=True))
    assert (seen.resident, seen.free, seen.available) == (120 * UNIT, 0, 0)


def test_elastic_weights_are_known_to_within_a_page() -> None:
    rules = replace(RULES, patchers="dynamic", headroom_bytes=256 * UNIT)
    seen = Replay(card(10_000), rules).phase(need(model("a", 9_000), minimum=3_000))
    assert (seen.resident, seen.lower, seen.upper) == (6_744 * UNIT, 6_712 * UNIT, 6_776 * UNIT)
    fits = Replay(card(20_000), rules).phase(need(model("a", 9_000), minimum=3_000))
    assert (fits.resident, fits.lower, fits.upper) == (9_000 * UNIT,) * 3


def test_bounds_of_activations_are_bounds_of_elastic_weights() -> None:
    rules = replace(RULES, patchers="dynamic")
    asked = need(model("a", 9_000), minimum=3_000)._replace(lower=1_000 * UNIT, upper=5_000 * UNIT)
    seen = Replay(card(10_000), rules).phase(asked)
    assert (seen.resident, seen.lower, seen.upper) == (7_000 * UNIT, 4_968 * UNIT, 9_000 * UNIT)


def test_a_legacy_patcher_among_elastic_models_makes_them_leave() -> None:
    rules = replace(RULES, patchers="dynamic")
    gguf = model("gguf", 60)
    replay = Replay(card(100), rules)
    replay.phase(need(model("elastic", 90)))
    seen = replay.phase(need(gguf, minimum=10)._replace(weights={gguf.key: Weights(elastic=False)}))
    assert (seen.resident, seen.leaving) == (60 * UNIT, ("elastic",))
    assert seen.others == 24 * UNIT


PARTS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(
    models=st.lists(
        st.tuples(PARTS, st.integers(0, 60), st.integers(0, 60), st.sampled_from(["", "x"])), min_size=1, max_size=6
    ),
    size=st.integers(0, 200),
    streams=st.integers(0, 3),
    reserve=st.integers(0, 20),
    state=st.sampled_from(["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"]),
    patchers=st.sampled_from(["legacy", "dynamic"]),
)
def test_weights_never_take_what_the_minimum_needs(
    models: list[tuple[list[int], int, int, str]],
    size: int,
    streams: int,
    reserve: int,
    state: str,
    patchers: Literal["legacy", "dynamic"],
) -> None:
    rules = HostRules(
        reserve_bytes=reserve * UNIT,
        minimum_inference_bytes=reserve * UNIT,
        headroom_bytes=0,
        vram_state=state,
        offload_streams=streams,
        patchers=patchers,
    )
    replay = Replay(card(size), rules)
    for index, (parts, minimum, more, patches) in enumerate(models):
        modules = tuple(Module(part * UNIT, part * UNIT) for part in sorted(parts, reverse=True))
        ref, weights = whole(str(index % 3), patches, modules)
        seen = replay.phase(Need((ref,), minimum * UNIT, (minimum + more) * UNIT, weights))
        assert seen.lower <= seen.resident <= seen.upper <= sum(parts) * UNIT
        assert seen.resident + seen.offloaded == ref.resident_bytes
        assert dict(seen.after).get(ref.key, 0) == seen.resident
        if seen.resident:
            assert seen.resident + seen.others + minimum * UNIT <= size * UNIT
