"""The replay of the host's load and evict rules, in exact bytes."""

from dataclasses import replace

from planlab import RULES, UNIT, card, model
from vram_headroom.vram.plan.residency import Need, Replay
from vram_headroom.vram.plan.types import HeldModel, HostRules, ModelRef


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
