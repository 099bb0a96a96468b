"""How many steps a sampler runs, by its own widgets and by what lies between its schedule and it."""

from typing import Any

import planlab
import pytest
from planlab import RULES, node
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.types import NodeSpec

SIGMAS = {"sigmas": "SIGMAS"}
VOCABULARY = {
    **planlab.VOCABULARY,
    "BasicScheduler": NodeSpec({"model": "MODEL", "steps": "INT", "denoise": "FLOAT"}, ("SIGMAS",), False, {"denoise": 1.0}),
    "KarrasScheduler": NodeSpec({"steps": "INT", "sigma_max": "FLOAT"}, ("SIGMAS",)),
    "AlignYourStepsScheduler": NodeSpec({"steps": "INT", "denoise": "FLOAT"}, ("SIGMAS",), False, {"denoise": 1.0}),
    "SDTurboScheduler": NodeSpec({"model": "MODEL", "steps": "INT", "denoise": "FLOAT"}, ("SIGMAS",), False, {"denoise": 1.0}),
    "ManualSigmas": NodeSpec({"sigmas": "STRING"}, ("SIGMAS",)),
    "SplitSigmas": NodeSpec({**SIGMAS, "step": "INT"}, ("SIGMAS", "SIGMAS")),
    "SplitSigmasDenoise": NodeSpec({**SIGMAS, "denoise": "FLOAT"}, ("SIGMAS", "SIGMAS")),
    "FlipSigmas": NodeSpec(SIGMAS, ("SIGMAS",)),
    "SomebodysSigmas": NodeSpec(SIGMAS, ("SIGMAS",)),
    "SamplerCustom": NodeSpec({"model": "MODEL", "cfg": "FLOAT", "sigmas": "SIGMAS", "latent_image": "LATENT"}, ("LATENT",)),
    "ClownsharKSampler_Beta": NodeSpec(
        {"model": "MODEL", "steps": "INT", "steps_to_run": "INT", "cfg": "FLOAT", "latent_image": "LATENT"}, ("LATENT",)
    ),
}


def steps_of(sampler: dict[str, Any], **nodes: Any) -> int | None:
    """Of a graph that samples with `sampler`."""
    prompt = {
        "1": node("UNETLoader", unet_name="low_noise.safetensors", weight_dtype="default"),
        "2": node("VAELoader", vae_name="vae.safetensors"),
        "3": node("EmptyHunyuanLatentVideo", width=640, height=640, length=81, batch_size=1),
        "9": node("VAEDecode", samples=("s", 0), vae=("2", 0)),
        "10": node("SaveVideo", images=("9", 0)),
        **nodes,
    }
    inputs = {"model": ["1", 0], "cfg": 5.0, "latent_image": ["3", 0], **sampler["inputs"]}
    chain = build_chain(
        {**prompt, "s": {**sampler, "inputs": inputs}}, VOCABULARY, planlab.library, RULES, planlab.card(100_000)
    )
    return next(phase.steps for phase in chain.phases if phase.kind == "sample")


def handed(**nodes: Any) -> int | None:
    """Steps of a sampler that is handed what node "h" makes, from output 0 or, where there is one, what "slot" says."""
    slot = nodes.pop("slot", 0)
    return steps_of(node("SamplerCustom", sigmas=("h", slot)), **nodes)


BASIC = node("BasicScheduler", model=("1", 0), steps=20)


def test_a_schedule_has_as_many_steps_as_it_says() -> None:
    assert handed(h=BASIC) == 20
    assert handed(h=node("KarrasScheduler", steps=7, sigma_max=14.6)) == 7
    assert handed(h=node("ManualSigmas", sigmas="1.0, 0.9, .75,0.5, 0")) == 4


def test_part_of_the_noise_takes_all_steps_or_a_part_of_them_as_the_scheduler_has_it() -> None:
    assert handed(h=node("BasicScheduler", model=("1", 0), steps=20, denoise=0.5)) == 20
    assert handed(h=node("BasicScheduler", model=("1", 0), steps=20, denoise=0)) == 0
    assert handed(h=node("AlignYourStepsScheduler", steps=10, denoise=0.45)) == 4
    assert handed(h=node("SDTurboScheduler", model=("1", 0), steps=4, denoise=0.2)) == 2


@pytest.mark.parametrize(("at", "high", "low"), [(0, 0, 20), (7, 7, 13), (20, 20, 0), (99, 20, 0)])
def test_two_experts_share_a_split_schedule(at: int, high: int, low: int) -> None:
    split = node("SplitSigmas", sigmas=("b", 0), step=at)
    assert (handed(h=split, b=BASIC), handed(h=split, b=BASIC, slot=1)) == (high, low)


@pytest.mark.parametrize(("share", "high", "low"), [(1.0, 0, 20), (0.3, 14, 6), (0.0, 0, 0)])
def test_a_schedule_is_split_by_its_noise(share: float, high: int, low: int) -> None:
    split = node("SplitSigmasDenoise", sigmas=("b", 0), denoise=share)
    assert (handed(h=split, b=BASIC), handed(h=split, b=BASIC, slot=1)) == (high, low)


def test_what_lies_between_is_counted_where_it_is_known_and_unknown_where_not() -> None:
    nodes = {"b": BASIC, "f": node("FlipSigmas", sigmas=("b", 0))}
    assert handed(h=node("SplitSigmas", sigmas=("f", 0), step=5), slot=1, **nodes) == 15
    assert (
        handed(
            h=node("SplitSigmas", sigmas=("s1", 1), step=5), slot=1, s1=node("SplitSigmas", sigmas=("b", 0), step=2), **nodes
        )
        == 13
    )
    assert handed(h=node("Reroute", **{"": ("b", 0)}), b=BASIC) == 20
    assert handed(h=node("SomebodysSigmas", sigmas=("b", 0)), b=BASIC) is None


def test_a_switch_hands_on_the_schedule_it_takes() -> None:
    nodes = {"b": BASIC, "c": node("BasicScheduler", model=("1", 0), steps=4)}
    assert handed(h=node("ComfySwitchNode", switch=True, on_true=("c", 0), on_false=("b", 0)), **nodes) == 4


def test_a_sampler_may_run_fewer_steps_than_it_has() -> None:
    assert steps_of(node("ClownsharKSampler_Beta", steps=20, steps_to_run=8)) == 8
    assert steps_of(node("ClownsharKSampler_Beta", steps=20, steps_to_run=-1)) == 20
    assert steps_of(node("KSampler", steps=20, denoise=0.6)) == 20
    assert steps_of(node("KSampler", steps=20, denoise=0.0)) == 0


def test_numbers_that_a_script_wrote_as_text_are_read_as_comfyui_reads_them() -> None:
    assert steps_of(node("KSampler", steps="12")) == 12
    assert steps_of(node("KSampler", steps="twelve")) is None
