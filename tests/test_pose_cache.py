"""Animate 2's cache node keeps gigabytes while its sampler runs, which no loader shows."""

from dataclasses import replace

import planlab
import pytest
from planlab import RULES, node, wan_model
from test_templates import chain_of as template_chain
from test_templates import expected_of, prompt_of
from vram_headroom.vram.estimate.caches import pose_cache
from vram_headroom.vram.estimate.tokens import Latent, Video
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.needs import need_of, pose_cache_bytes
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.ram import SystemMemory
from vram_headroom.vram.plan.types import Chain, NodeSpec, Phase, PoseCache

GIB = 1 << 30
VOCABULARY = {
    **planlab.VOCABULARY,
    "WanAnimate2Cache": NodeSpec(
        {"model": "MODEL", "device": "COMBO", "dtype": "COMBO"}, ("MODEL",), False, {"device": "cpu", "dtype": "default"}
    ),
}


def sampling(cache: PoseCache | None) -> Phase:
    """480x848, 81 frames and the reference before them, with a model of 14B."""
    plain = wan_model(5120, 8)
    model = replace(plain, arch=replace(plain.arch, variant="animate2", layers=40))
    return Phase("sample", "1", "KSampler", (model,), (), 480, 848, 85, 1, 10, 1.0, "Sampling", pose_cache=cache)


def test_it_is_the_input_of_every_block_of_the_pose_branch() -> None:
    latent = Video(480, 832, 81).latent()
    # its own tooltip: about 12.5 GB at 480x832, 81 frames, in bf16
    assert pose_cache(latent, layers=40, dim=5120, bits=16) / 1e9 == pytest.approx(12.5, rel=0.08)
    assert pose_cache(Latent(1, 21, 60, 106), layers=40, dim=5120, bits=8) == pytest.approx(6_838_272_000, rel=0.001)
    assert pose_cache(latent, layers=40, dim=5120, bits=4) < pose_cache(latent, layers=40, dim=5120, bits=8) / 1.99


@pytest.mark.parametrize(("bits", "gigabytes"), [(0, 13.68), (8, 6.84), (4, 3.42)])
def test_on_the_card_it_comes_on_top_of_the_forward(bits: int, gigabytes: float) -> None:
    without, with_it = need_of(sampling(None), RULES), need_of(sampling(PoseCache(True, bits)), RULES)
    assert without.required is not None
    assert with_it.required is not None
    kept = with_it.required.expected - without.required.expected
    assert kept == pose_cache_bytes(sampling(PoseCache(True, bits)), RULES)
    assert kept / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert "cached pose activations" in {term.name for term in with_it.required.terms}
    # ComfyUI knows nothing of it and makes no room for it
    assert with_it.host == without.host


def test_off_the_card_it_takes_system_memory() -> None:
    memory = SystemMemory(64 * GIB, 60 * GIB)

    def need(cache: PoseCache | None) -> int:
        phase = sampling(cache)
        plan = make_plan(Chain((phase,), phase.models), planlab.card(60_000), RULES, memory=memory)
        assert plan.ram is not None
        assert plan.ram.need is not None
        return plan.ram.need.expected

    assert need(PoseCache(False, 8)) - need(None) == pytest.approx(6_838_272_000, rel=0.001)
    assert need(PoseCache(True, 8)) == need(None)


@pytest.mark.parametrize("name", ["video_wan_animate2", "video_wan_animate2_distilled"])
def test_the_official_workflows_keep_it_on_the_card_in_8_bit(name: str) -> None:
    told = [phase["node_id"] for phase in expected_of(name)["phases"] if phase.get("extra_resident")]
    found = {phase.node_id: phase.pose_cache for phase in template_chain(prompt_of("prompts", name)).phases}
    assert {node_id: cache for node_id, cache in found.items() if cache} == dict.fromkeys(told, PoseCache(True, 8))


def test_of_two_on_the_way_the_last_counts_and_defaults_are_as_declared() -> None:
    prompt = planlab.two_experts()
    prompt["90"] = node("WanAnimate2Cache", model=("76", 0), device="gpu", dtype="int4")
    prompt["91"] = node("WanAnimate2Cache", model=("90", 0))
    prompt["82"]["inputs"]["model"] = ["91", 0]
    chain = build_chain(prompt, VOCABULARY, planlab.library, RULES, planlab.card(1))
    assert [phase.pose_cache for phase in chain.phases if phase.kind == "sample"] == [None, PoseCache(False, 0)]
