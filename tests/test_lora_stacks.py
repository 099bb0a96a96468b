"""LoRAs by whatever loader a person has: ComfyUI's own, and the stacks of the rgthree, Efficiency and Comfyroll packs."""

from typing import Any

import planlab
import pytest
from planlab import RULES, node
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.types import NodeSpec

PATCHED = {"model": "MODEL", "clip": "CLIP"}
VOCABULARY = {
    **planlab.VOCABULARY,
    "LoraLoader": NodeSpec(
        {**PATCHED, "lora_name": "COMBO", "strength_model": "FLOAT", "strength_clip": "FLOAT"}, ("MODEL", "CLIP")
    ),
    "Power Lora Loader (rgthree)": NodeSpec(PATCHED, ("MODEL", "CLIP")),
    "Lora Loader Stack (rgthree)": NodeSpec({**PATCHED, "lora_01": "COMBO", "strength_01": "FLOAT"}, ("MODEL", "CLIP")),
    "LoRA Stacker": NodeSpec({"lora_count": "INT", "lora_stack": "LORA_STACK"}, ("LORA_STACK",)),
    "CR LoRA Stack": NodeSpec({"switch_1": "COMBO", "lora_name_1": "COMBO", "lora_stack": "LORA_STACK"}, ("LORA_STACK",)),
    "CR Apply LoRA Stack": NodeSpec({**PATCHED, "lora_stack": "LORA_STACK"}, ("MODEL", "CLIP")),
}


def loras_of(*patches: dict[str, Any], **nodes: Any) -> list[str]:
    """Of a sampler whose model passes through `patches`."""
    prompt = {
        "1": node("UNETLoader", unet_name="low_noise.safetensors", weight_dtype="default"),
        "2": node("CLIPLoader", clip_name="umt5.safetensors", type="wan"),
        "3": node("EmptyHunyuanLatentVideo", width=640, height=640, length=81, batch_size=1),
        "4": node("VAELoader", vae_name="vae.safetensors"),
        **nodes,
    }
    last = ["1", 0]
    for index, patch in enumerate(patches):
        prompt[f"p{index}"] = {**patch, "inputs": {"model": last, "clip": ["2", 0], **patch["inputs"]}}
        last = [f"p{index}", 0]
    prompt["8"] = node("KSampler", model=tuple(last), steps=4, cfg=1.0, latent_image=("3", 0))
    prompt["9"] = node("VAEDecode", samples=("8", 0), vae=("4", 0))
    prompt["10"] = node("SaveVideo", images=("9", 0))
    chain = build_chain(prompt, VOCABULARY, planlab.library, RULES, planlab.card(100_000))
    return [lora.file for phase in chain.phases if phase.kind == "sample" for lora in phase.loras]


def power(**loras: Any) -> dict[str, Any]:
    return node("Power Lora Loader (rgthree)", **{"PowerLoraLoaderHeaderWidget": {"type": "header"}, **loras})


def test_a_power_loader_patches_what_is_switched_on() -> None:
    loader = power(
        lora_1={"on": True, "lora": "fast.safetensors", "strength": 1.0},
        lora_2={"on": False, "lora": "off.safetensors", "strength": 1.0},
        lora_3={"on": True, "lora": "style.safetensors", "strength": 0.5, "strengthTwo": None},
        lora_4={"on": True, "lora": "nothing.safetensors", "strength": 0},
        lora_5={"on": True, "lora": "None", "strength": 1},
    )
    assert loras_of(loader) == ["fast.safetensors", "style.safetensors"]


def test_a_stack_is_patched_where_it_is_applied() -> None:
    stacks = {
        "s": node("LoRA Stacker", lora_count=2, lora_name_1="a.safetensors", lora_wt_1=1.0, lora_name_2="None",
                  lora_name_3="beyond.safetensors", lora_wt_3=1.0, lora_stack=("t", 0)),
        "t": node("CR LoRA Stack", switch_1="On", lora_name_1="b.safetensors", model_weight_1=1.0, switch_2="Off",
                  lora_name_2="c.safetensors", model_weight_2=1.0),
    }  # fmt: skip
    assert loras_of(node("CR Apply LoRA Stack", lora_stack=("s", 0)), **stacks) == ["b.safetensors", "a.safetensors"]


def test_loaders_in_a_row_and_a_loader_of_several_count_from_the_model_on() -> None:
    several = node(
        "Lora Loader Stack (rgthree)",
        lora_01="one.safetensors", strength_01=1.0, lora_02="two.safetensors", strength_02=0.8, lora_03="x", strength_03=0,
    )  # fmt: skip
    first = node("LoraLoader", lora_name="zero.safetensors", strength_model=1.0, strength_clip=1.0)
    assert loras_of(first, several) == ["zero.safetensors", "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("odd", [None, 4, [], {}, {"lora": 7}, {"on": True, "lora": None}, ["gone", 0]])
def test_what_is_no_lora_is_none(odd: object) -> None:
    assert loras_of(node("Power Lora Loader (rgthree)", lora_1=odd)) == []


def test_stacks_that_run_in_a_circle_end() -> None:
    circle = {"s": node("LoRA Stacker", lora_count=1, lora_name_1="a.safetensors", lora_stack=("s", 0))}
    with pytest.raises(ValueError, match="loop"):
        loras_of(node("CR Apply LoRA Stack", lora_stack=("s", 0)), **circle)
