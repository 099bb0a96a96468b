"""A plan starts from the state that the prompts before it leave: what they load, what their policies keep and send away."""

from pathlib import Path
from typing import Any

import planlab
from client import history_of
from host.process import start_host
from insidehost import ask_inside
from planlab import RULES, UNIT, node
from prompts import official, with_our_loaders
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import QUEUED, make_plan
from vram_headroom.vram.plan.types import Chain, Earlier

CHECK = "/api/v1/hardware/vram/check"
CARD = planlab.card(16_000)


def one_model(unet: str) -> dict[str, Any]:
    return {
        "1": node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "2": node("VAELoader", vae_name="vae.safetensors"),
        "3": node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
        "4": node("KSampler", model=("1", 0), seed=1, steps=4, cfg=1.0, latent_image=("3", 0)),
        "5": node("VAEDecode", samples=("4", 0), vae=("2", 0)),
        "6": node("SaveVideo", images=("5", 0)),
    }


def chain_of(prompt: object) -> Chain:
    return build_chain(prompt, planlab.VOCABULARY, planlab.library, RULES, CARD)


def key_of(chain: Chain, role: str) -> tuple[str, str, str]:
    return next(model.key for model in chain.models if model.role == role)


HIGH, LOW = chain_of(one_model("high_noise.safetensors")), chain_of(one_model("low_noise.safetensors"))


def test_what_an_earlier_prompt_loads_is_there_and_leaves_where_room_is_needed() -> None:
    plan = make_plan(LOW, CARD, RULES, before=(Earlier(HIGH),))
    alone = make_plan(LOW, CARD, RULES)
    assert alone.phases[0].others == 0
    assert plan.phases[0].others == sum(model.resident_bytes or 0 for model in HIGH.models)
    small = planlab.card(8_000)
    assert make_plan(LOW, small, RULES, before=(Earlier(HIGH),)).phases[0].leaving == ("high_noise.safetensors",)
    assert make_plan(LOW, small, RULES).phases[0].leaving == ()


def test_the_same_prompt_again_has_nothing_new_to_load() -> None:
    again = make_plan(HIGH, CARD, RULES, before=(Earlier(HIGH),))
    assert again.new_bytes == max(planned.activation.expected for planned in again.phases if planned.activation)
    assert make_plan(HIGH, CARD, RULES).new_bytes > 6_000 * UNIT
    assert QUEUED in again.assumptions


def test_prompts_are_replayed_in_their_order() -> None:
    small = planlab.card(8_000)
    low_last = make_plan(LOW, small, RULES, before=(Earlier(HIGH), Earlier(LOW)))
    high_last = make_plan(LOW, small, RULES, before=(Earlier(LOW), Earlier(HIGH)))
    assert (low_last.phases[0].leaving, high_last.phases[0].leaving) == ((), ("high_noise.safetensors",))
    assert QUEUED in low_last.assumptions


def test_a_policy_sends_models_away_between_prompts_and_keeps_others() -> None:
    generator, vae = key_of(HIGH, "generator"), key_of(HIGH, "vae")
    left = make_plan(LOW, CARD, RULES, before=(Earlier(HIGH, leaves=frozenset({generator})),))
    assert left.phases[0].others == 10 * UNIT, "the VAE alone"
    # a card that has room for one expert: the VAE goes before it unless it is pinned
    tight = planlab.card(6_005)
    free = make_plan(LOW, tight, RULES, before=(Earlier(HIGH),)).phases[0]
    kept = make_plan(LOW, tight, RULES, before=(Earlier(HIGH, pinned=frozenset({vae})),)).phases[0]
    assert (free.others, kept.others) == (0, 10 * UNIT)
    assert kept.resident < free.resident


def test_a_check_behind_a_running_prompt_and_a_plan_made_as_it_starts() -> None:
    first, second = official("text_to_video_wan"), with_our_loaders(official("text_to_video_wan"))
    with start_host(vram_gb=16) as host:
        host.post("/_host/hold", {"node_id": "3", "step": 2})
        prompt_id = host.post("/prompt", {"prompt": first}).body["prompt_id"]
        host.get("/_host/held")
        waiting = host.post("/prompt", {"prompt": second}).body["prompt_id"]
        seeds = [{**first, "3": {**first["3"], "inputs": {**first["3"]["inputs"], "seed": seed}}} for seed in range(12)]
        others = [host.post("/prompt", {"prompt": prompt}).body["prompt_id"] for prompt in seeds]
        behind = host.post(CHECK, first).body
        assert QUEUED in behind["assumptions"]
        assert behind["phases"][0]["other_models_bytes"] > 0
        host.post("/_host/release")
        for ended in (prompt_id, waiting, *others):
            assert history_of(host.url, ended)["status"]["status_str"] == "success"
        assert QUEUED not in host.post(CHECK, first).body["assumptions"]


QUEUE = """
from vram_headroom.nodes.controls import Control
from vram_headroom.nodes.host.server import QueuedPrompt
from vram_headroom.vram.plan.planner import QUEUED
prompt = PROMPT
pack = Control.pack
def before(*running, front):
    queue = tuple(QueuedPrompt(str(number), prompt, ("60",), runs) for number, runs in enumerate(running))
    pack.host.server.queued = lambda: queue
    return QUEUED in pack.plan(prompt, front=front).assumptions
answer([before(False, front=False), before(False, front=True), before(True, False, front=True), before(front=False)])
"""


def test_a_prompt_that_goes_to_the_front_of_the_queue_comes_after_the_running_one_alone(tmp_path: Path) -> None:
    script = QUEUE.replace("PROMPT", repr(official("text_to_video_wan")))
    assert ask_inside(script, tmp_path, served=True) == [True, False, True, False]
