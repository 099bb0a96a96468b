"""Verdicts and their sentences, from whole graphs on cards from too small to ample."""

import json
import re
from dataclasses import replace
from pathlib import Path

import planlab
import pytest
from planlab import RULES, UNIT
from vram_headroom.vram.estimate.estimate import NOTHING
from vram_headroom.vram.plan.advice import FixReport
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.needs import need_of
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.report import (
    CardReport,
    CheckReport,
    EstimateReport,
    ModelReport,
    PhaseReport,
    RamReport,
    TermReport,
    check_report,
)
from vram_headroom.vram.plan.types import Card, HeldModel, HostRules, Phase, PhasePlan, Plan
from vram_headroom.vram.units import say_gib

GIB = 1 << 30


def plan_of(units: int, prompt: object = None, rules: HostRules = RULES, card: Card | None = None) -> Plan:
    card = card or planlab.card(units)
    chain = build_chain(prompt or planlab.two_experts(), planlab.VOCABULARY, planlab.library, rules, card)
    return make_plan(chain, card, rules)


def test_the_four_verdicts_follow_the_size_of_the_card() -> None:
    verdicts = [plan_of(units).verdict for units in (100, 1_000, 5_700, 30_000)]
    assert verdicts == ["does_not_fit", "does_not_fit", "fits_with_offload", "fits"]
    prompt = planlab.two_experts()
    prompt["75"] = planlab.node("MagicModelMaker", seed=1)
    assert plan_of(100_000, prompt).verdict == "unknown"


def test_a_class_the_host_does_not_have_is_unknown_on_the_smallest_card_too() -> None:
    """Nobody knows what such a node does to sizes and models."""
    prompt = planlab.two_experts()
    prompt["90"] = planlab.node("NodeOfTomorrow", images=("87", 0))
    prompt["80"]["inputs"]["images"] = ["90", 0]
    plan = plan_of(100, prompt)
    assert plan.verdict == "unknown"
    assert "NodeOfTomorrow 90 is of a class this ComfyUI does not have" in plan.message


def test_clips_that_comfyui_decodes_together_need_their_room_together() -> None:
    """As many as its own figure lets it, so that a small card decodes one after the other."""

    def decode(units: int, batch: int) -> PhasePlan:
        return plan_of(units, planlab.two_experts(batch_size=batch)).phases[-1]

    one, three = decode(60_000, 1), decode(60_000, 3)
    assert (one.at_once, three.at_once) == (1, 3)
    assert one.activation is not None
    assert three.activation is not None
    assert 2.5 < three.activation.expected / one.activation.expected < 3.5
    assert decode(9_000, 3).at_once == 1


def test_a_larger_card_never_makes_the_verdict_worse() -> None:
    order = ["does_not_fit", "fits_with_offload", "fits"]
    ranks = [order.index(plan_of(units).verdict) for units in range(200, 30_000, 400)]
    assert ranks == sorted(ranks)


def test_what_does_not_fit_is_said_with_the_phase_the_sizes_and_what_is_missing() -> None:
    plan = plan_of(1_000)
    assert plan.runs is False
    assert plan.peak_phase is not None
    worst = plan.phases[plan.peak_phase]
    assert worst.activation is not None
    assert worst.short == worst.activation.expected - worst.available > 0
    assert plan.message == (
        f"{worst.phase.title} (node {worst.phase.node_id}) needs about {say_gib(worst.activation.expected)} at 640×640, "
        f"81 frames beside its weights; {say_gib(worst.available)} of this card's 1.0 GB can be free then. "
        f"Short by {say_gib(worst.short)}."
    )


def test_what_streams_is_said_in_bytes_per_step() -> None:
    plan = plan_of(5_700)
    sample = plan.phases[2]
    assert plan.verdict == "fits_with_offload"
    assert sample.resident + sample.streamed // 2 == sample.phase.models[0].resident_bytes
    assert "streams" in plan.message
    assert "per step" in plan.message


def test_cond_and_uncond_apart_stream_the_weights_twice_and_cfg_1_once() -> None:
    prompt = planlab.two_experts()
    for sampler in ("81", "78"):
        prompt[sampler]["inputs"]["cfg"] = 1.0
    slow, fast = plan_of(5_700).phases[2], plan_of(5_700, prompt).phases[2]
    assert slow.resident == fast.resident
    assert slow.streamed == 2 * fast.streamed > 0


def test_loras_on_streaming_weights_take_their_room() -> None:
    plain, patched = plan_of(5_700).phases[2], plan_of(5_700, planlab.two_experts(fast=True)).phases[2]
    assert patched.resident < plain.resident


def test_batched_cond_and_uncond_need_twice_the_room_and_only_when_it_is_there() -> None:
    small, large = plan_of(5_700).phases[2], plan_of(60_000).phases[2]
    assert (small.batched, large.batched) == (False, True)
    need = need_of(large.phase, RULES)
    assert need.required is not None
    assert need.batched is not None
    assert large.activation == need.batched
    assert 1.5 < need.batched.expected / need.required.expected < 2.0, "latents and the rotary table are there once"


def test_other_programs_memory_is_not_planned_with() -> None:
    assert plan_of(30_000).verdict == "fits"
    assert plan_of(0, card=planlab.card(30_000, free=1_000)).verdict == "does_not_fit"


def test_a_plan_is_the_same_for_the_same_question() -> None:
    first, second = plan_of(5_700), plan_of(5_700)
    assert first == second
    assert first.plan_id == second.plan_id
    assert first.plan_id != plan_of(5_701).plan_id
    assert first.plan_id != plan_of(5_700, planlab.two_experts(length=77)).plan_id


def test_every_field_of_the_answer_is_documented_and_no_other() -> None:
    text = (Path(__file__).parents[1] / "docs" / "check.md").read_text(encoding="utf-8")
    for report in (CheckReport, CardReport, RamReport, ModelReport, PhaseReport, EstimateReport, TermReport, FixReport):
        section = text.split(f"## {report.__name__.removesuffix('Report')}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(report.__annotations__), report


def test_the_bus_is_counted_over_the_whole_run_and_timed_only_by_a_measured_one() -> None:
    plan = plan_of(5_700)
    streamed = sum(planned.streamed * (planned.phase.steps or 1) for planned in plan.phases)
    answer = check_report(plan)
    assert (answer["bus_bytes"], answer["bus_seconds"]) == (streamed, None)
    assert streamed > plan.phases[2].streamed * 10
    assert check_report(plan, bus_bytes_per_second=streamed // 4)["bus_seconds"] == pytest.approx(4, rel=0.001)


def test_each_phase_says_what_others_hold_and_what_the_host_reserves() -> None:
    held = HeldModel(None, "somebody's", 500 * UNIT, 300 * UNIT)
    card = planlab.card(20_000, free=18_700)
    rules = replace(RULES, reserve_bytes=400 * UNIT)
    chain = build_chain(planlab.two_experts(), planlab.VOCABULARY, planlab.library, rules, card)
    phases = check_report(make_plan(chain, card, rules, (held,)))["phases"]
    assert {(phase["other_programs_bytes"], phase["reserve_bytes"]) for phase in phases} == {(1_000 * UNIT, 400 * UNIT)}
    assert {phase["cache_bytes"] for phase in phases} == {0}


def test_plans_of_one_graph_under_other_rules_are_told_apart() -> None:
    assert plan_of(5_700).plan_id != plan_of(5_700, rules=replace(RULES, vram_state="LOW_VRAM")).plan_id


def test_the_answer_is_json_with_the_promised_fields() -> None:
    answer = json.loads(json.dumps(check_report(plan_of(1_000))))
    assert {
        "fits", "verdict", "message", "card", "ram", "models", "phases", "fixes", "assumptions", "plan_id", "peak_phase",
        "bus_bytes", "bus_seconds",
    } == set(answer)  # fmt: skip
    assert answer["fits"] is False
    vae = next(model for model in answer["models"] if model["role"] == "vae")
    assert vae["node_id"] == "73"
    assert vae["file"] == "vae.safetensors"
    assert vae["bytes"] == 20 * UNIT
    assert vae["resident_bytes"] == 10 * UNIT, "fp32 on disk, 16 bit on the card"
    sample = answer["phases"][2]
    assert sample["kind"] == "sample"
    assert sample["short_bytes"] == plan_of(1_000).phases[2].short
    lower, expected, upper = (sample["activation_bytes"][name] for name in ("lower", "expected", "upper"))
    assert lower < expected < upper
    assert sum(term["bytes"] for term in sample["activation_terms"]) == expected


def test_a_graph_without_models_is_unknown_and_says_so() -> None:
    prompt = {"1": planlab.node("LoadImage", image="a.png"), "2": planlab.node("SaveVideo", images=("1", 0))}
    plan = plan_of(1_000, prompt)
    assert (plan.verdict, plan.runs) == ("unknown", True)
    assert plan.message.startswith("No model of a type this check knows (MODEL, CLIP, VAE,")


def test_a_phase_of_unknown_size_makes_the_verdict_unknown_but_a_known_shortage_stays() -> None:
    prompt = planlab.two_experts()
    prompt["74"]["inputs"]["length"] = ["99", 0]
    prompt["99"] = planlab.node("RandomSize", seed=1)
    assert plan_of(100_000, prompt).verdict == "unknown"
    prompt["5"] = planlab.node("EmptyHunyuanLatentVideo", width=1280, height=720, length=81)
    prompt["6"] = planlab.node("VAEDecode", samples=("5", 0), vae=("73", 0))
    prompt["7"] = planlab.node("SaveVideo", images=("6", 0))
    assert plan_of(300, prompt).verdict == "does_not_fit"


# ComfyUI's own formulas evaluated by hand for the cases of its issue tracker and docs, GiB
@pytest.mark.parametrize(
    ("dim", "stride", "width", "height", "frames", "single", "decode"),
    [
        (1536, 8, 832, 480, 81, 1.77, 5.21),
        (5120, 8, 832, 480, 81, 5.90, 5.21),
        (5120, 8, 1280, 720, 81, 13.61, 12.02),
        (3072, 16, 1280, 704, 121, 2.95, 13.43),
    ],
)
def test_what_the_host_makes_room_for_is_comfyuis_own_figure(
    dim: int, stride: int, width: int, height: int, frames: int, single: float, decode: float
) -> None:
    generator = planlab.wan_model(dim, stride)
    phase = Phase("sample", "1", "KSampler", (generator,), width=width, height=height, frames=frames, batch=1)
    assert need_of(phase, HostRules()).host / GIB == pytest.approx(single, abs=0.006)
    assert need_of(phase, HostRules()).host_batched / GIB == pytest.approx(2 * single, abs=0.012)
    phase = replace(phase, kind="vae_decode", models=(planlab.vae_model(stride),))
    assert need_of(phase, HostRules()).host / GIB == pytest.approx(decode, abs=0.006)


def test_without_flash_attention_the_host_has_another_formula() -> None:
    phase = Phase("sample", "1", "KSampler", (planlab.wan_model(2222, 8),), width=80, height=80, frames=1, batch=1)
    assert need_of(phase, HostRules()).host == 2 * UNIT
    assert need_of(phase, HostRules(flash_attention=False)).host == 15 * UNIT


def test_tensors_take_less_than_the_host_makes_room_for_and_the_terms_say_for_what() -> None:
    phase = Phase("sample", "1", "KSampler", (planlab.wan_model(5120, 8),), width=832, height=480, frames=81, batch=1)
    need = need_of(phase, HostRules())
    assert need.required is not None
    assert need.required.expected < need.host
    assert sum(term.bytes for term in need.required.terms) == need.required.expected
    assert {"feed-forward", "rotary table"} <= {term.name for term in need.required.terms}


def test_a_text_encoder_on_the_cpu_needs_nothing_of_the_card() -> None:
    prompt = planlab.two_experts()
    prompt["71"]["inputs"]["device"] = "cpu"
    encode = plan_of(30_000, prompt).phases[0]
    assert (encode.resident, encode.activation) == (0, NOTHING)


def test_many_phases_of_unknown_size_are_one_sentence() -> None:
    prompt = planlab.two_experts()
    prompt["74"]["inputs"]["width"] = ["99", 0]
    prompt["99"] = planlab.node("RandomSize", seed=1)
    assert plan_of(30_000, prompt).message == (
        "Can't tell whether this fits: what Sampling (high noise) (node 81) and 2 more need is not known before the graph runs."
    )


def test_what_to_make_room_for_is_what_is_not_loaded_yet() -> None:
    card = planlab.card(30_000)
    chain = build_chain(planlab.two_experts(), planlab.VOCABULARY, planlab.library, RULES, card)
    high = next(model for model in chain.models if model.file == "high_noise.safetensors")
    low = next(model for model in chain.models if model.file == "low_noise.safetensors")
    assert high.resident_bytes is not None
    assert low.resident_bytes is not None
    held = tuple(HeldModel(m.path, "WAN21", m.resident_bytes or 0, m.resident_bytes or 0) for m in (high, low))
    decode = make_plan(chain, card, RULES).phases[4]
    assert decode.activation is not None
    assert make_plan(chain, card, RULES).new_bytes > 6_000 * UNIT
    assert make_plan(chain, card, RULES, held).new_bytes == decode.activation.expected + decode.resident
