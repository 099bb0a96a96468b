"""Nodes that are as they were in the last run, and whose results are still there, are not charged."""

from typing import Any

import planlab
import pytest
from planlab import RULES, node
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.rerun import Kept, unchanged
from vram_headroom.vram.plan.types import Chain

CARD = planlab.card(100_000)


def graph() -> dict[str, Any]:
    return planlab.two_experts()


def kept_all(prompt: dict[str, Any], **fields: Any) -> Kept:
    return Kept("run", prompt, frozenset(prompt), **fields)


def chain_of(prompt: dict[str, Any], kept: Kept | None) -> Chain:
    return build_chain(prompt, planlab.VOCABULARY, planlab.library, RULES, CARD, cached=unchanged(prompt, kept))


def kinds(chain: Chain) -> list[str]:
    return [phase.kind for phase in chain.phases]


def test_the_same_graph_again_has_nothing_to_do_and_says_so() -> None:
    chain = chain_of(graph(), kept_all(graph()))
    plan = make_plan(chain, planlab.card(1), RULES)
    assert (chain.phases, plan.verdict) == ((), "fits")
    assert plan.message == "Fits: nothing has to be computed, the results of the last run are still there."


def test_only_a_plan_that_nothing_can_change_is_settled() -> None:
    picture = {"1": node("LoadImage", image="x.png"), "2": node("SaveVideo", video=["1", 0])}
    plans = {
        "a picture": make_plan(chain_of(picture, None), CARD, RULES),
        "a video": make_plan(chain_of(graph(), None), CARD, RULES),
        "a video whose results may go": make_plan(chain_of(graph(), kept_all(graph())), CARD, RULES),
        "a node nobody knows": make_plan(
            chain_of({**picture, "2": node("SaveVideo", video=["3", 0]), "3": node("NoSuchNode")}, None), CARD, RULES
        ),
    }
    assert {name for name, plan in plans.items() if plan.settled} == {"a picture"}


def test_another_seed_of_the_second_sampler_samples_and_decodes_alone() -> None:
    prompt = graph()
    prompt["78"]["inputs"]["noise_seed"] = 2
    assert kinds(chain_of(graph(), None)) == ["text_encode", "text_encode", "sample", "sample", "vae_decode"]
    assert kinds(chain_of(prompt, kept_all(graph()))) == ["sample", "vae_decode"]


def test_another_text_is_encoded_anew_and_the_other_is_not() -> None:
    prompt = graph()
    prompt["89"]["inputs"]["text"] = "a hare"
    chain = chain_of(prompt, kept_all(graph()))
    assert [phase.node_id for phase in chain.phases] == ["89", "81", "78", "87"]


def test_sizes_come_through_nodes_that_do_not_run() -> None:
    prompt = graph()
    prompt["78"]["inputs"]["noise_seed"] = 2
    sample = chain_of(prompt, kept_all(graph())).phases[0]
    assert (sample.width, sample.height, sample.frames, sample.steps) == (640, 640, 81, 10)


@pytest.mark.parametrize("lost", ["74", "81", "78"])
def test_what_is_no_longer_kept_runs_with_what_it_needs(lost: str) -> None:
    whole = kept_all(graph())
    kept = Kept("run", graph(), whole.nodes - {lost, "80", "87"})
    ran = [phase.node_id for phase in chain_of(graph(), kept).phases]
    # the results that are there save the rest, whatever became of what they were made from
    assert ran == (["78", "87"] if lost == "78" else ["87"])


def test_what_may_change_by_itself_is_never_taken_for_unchanged() -> None:
    kept = kept_all(graph(), changing=frozenset({"EmptyHunyuanLatentVideo"}))
    assert unchanged(graph(), kept).isdisjoint({"74", "81", "78", "87", "80"})
    assert "89" in unchanged(graph(), kept)


def test_an_equal_node_under_another_id_is_not_counted_on() -> None:
    prompt = graph()
    prompt["900"] = prompt.pop("89")
    for sampler in ("81", "78"):
        prompt[sampler]["inputs"]["positive"] = ["900", 0]
    # ComfyUI puts the id into the key of some nodes
    assert "900" not in unchanged(prompt, kept_all(graph()))


@pytest.mark.parametrize("odd", [{}, {"1": 4}, {"1": {"inputs": 7}}, {"1": node("A", x=("1", 0))}, [], None])
def test_whatever_was_run_before_nothing_raises(odd: Any) -> None:
    kept = Kept("run", odd if isinstance(odd, dict) else {}, frozenset({"1", "89"}))
    assert unchanged(graph(), kept) == frozenset()
    assert unchanged(odd, kept_all(graph())) == frozenset()
