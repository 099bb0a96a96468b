"""Graphs of WanVideoWrapper and ComfyUI-GGUF: their types, their settings, and who places their weights.

Inputs and types are those of github.com/kijai/ComfyUI-WanVideoWrapper (nodes.py, nodes_model_loading.py, nodes_sampler.py) and
github.com/city96/ComfyUI-GGUF (nodes.py), the parts that say something of memory.
"""

from typing import Any

import planlab
import pytest
from planlab import RULES, UNIT, node
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.types import Chain, NodeSpec, Phase, Plan

WRAPPER = {
    "WanVideoModelLoader": NodeSpec(
        {
            "model": "COMBO",
            "base_precision": "COMBO",
            "quantization": "COMBO",
            "load_device": "COMBO",
            "block_swap_args": "BLOCKSWAPARGS",
            "lora": "WANVIDLORA",
        },
        ("WANVIDEOMODEL",),
    ),
    "WanVideoLoraSelect": NodeSpec({"lora": "COMBO", "strength": "FLOAT", "prev_lora": "WANVIDLORA"}, ("WANVIDLORA",)),
    "WanVideoLoraSelectMulti": NodeSpec(
        {"lora_0": "COMBO", "strength_0": "FLOAT", "lora_1": "COMBO", "strength_1": "FLOAT", "prev_lora": "WANVIDLORA"},
        ("WANVIDLORA",),
    ),
    "WanVideoSetLoRAs": NodeSpec({"model": "WANVIDEOMODEL", "lora": "WANVIDLORA"}, ("WANVIDEOMODEL",)),
    "WanVideoTextEncodeCached": NodeSpec(
        {"model_name": "COMBO", "precision": "COMBO", "positive_prompt": "STRING", "quantization": "COMBO", "device": "COMBO"},
        ("WANVIDEOTEXTEMBEDS", "WANVIDEOTEXTEMBEDS", "STRING"),
    ),
    "WanVideoContextOptions": NodeSpec({"context_frames": "INT", "context_overlap": "INT"}, ("WANVIDCONTEXT",)),
    "WanVideoSetBlockSwap": NodeSpec({"model": "WANVIDEOMODEL", "block_swap_args": "BLOCKSWAPARGS"}, ("WANVIDEOMODEL",)),
    "WanVideoBlockSwap": NodeSpec({"blocks_to_swap": "INT"}, ("BLOCKSWAPARGS",), False, {"blocks_to_swap": 20}),
    "WanVideoVAELoader": NodeSpec({"model_name": "COMBO", "precision": "COMBO"}, ("WANVAE",)),
    "LoadWanVideoT5TextEncoder": NodeSpec({"model_name": "COMBO", "precision": "COMBO"}, ("WANTEXTENCODER",)),
    "WanVideoTextEncode": NodeSpec(
        {"positive_prompt": "STRING", "negative_prompt": "STRING", "t5": "WANTEXTENCODER"}, ("WANVIDEOTEXTEMBEDS",)
    ),
    "WanVideoEmptyEmbeds": NodeSpec({"width": "INT", "height": "INT", "num_frames": "INT"}, ("WANVIDIMAGE_EMBEDS",)),
    "WanVideoImageToVideoEncode": NodeSpec(
        {"width": "INT", "height": "INT", "num_frames": "INT", "vae": "WANVAE", "start_image": "IMAGE"}, ("WANVIDIMAGE_EMBEDS",)
    ),
    "WanVideoSampler": NodeSpec(
        {
            "model": "WANVIDEOMODEL",
            "image_embeds": "WANVIDIMAGE_EMBEDS",
            "steps": "INT",
            "cfg": "FLOAT",
            "text_embeds": "WANVIDEOTEXTEMBEDS",
            "samples": "LATENT",
            "start_step": "INT",
            "end_step": "INT",
            "context_options": "WANVIDCONTEXT",
        },
        ("LATENT", "LATENT"),
        False,
        {"start_step": 0, "end_step": -1},
    ),
    "WanVideoDecode": NodeSpec(
        {
            "vae": "WANVAE",
            "samples": "LATENT",
            "enable_vae_tiling": "BOOLEAN",
            "tile_x": "INT",
            "tile_y": "INT",
            "tile_stride_x": "INT",
            "tile_stride_y": "INT",
        },
        ("IMAGE",),
    ),
    "UnetLoaderGGUF": NodeSpec({"unet_name": "COMBO"}, ("MODEL",)),
}

VOCABULARY = {**planlab.VOCABULARY, **WRAPPER}


def wrapper_prompt(**changes: Any) -> dict[str, Any]:
    prompt = {
        "1": node("WanVideoModelLoader", model="high_noise.safetensors", base_precision="bf16", quantization="disabled"),
        "2": node("WanVideoVAELoader", model_name="vae.safetensors", precision="bf16"),
        "3": node("LoadWanVideoT5TextEncoder", model_name="umt5.safetensors", precision="bf16"),
        "4": node("WanVideoTextEncode", positive_prompt="x", negative_prompt="", t5=("3", 0)),
        "5": node("WanVideoEmptyEmbeds", width=832, height=480, num_frames=81),
        "6": node("WanVideoSampler", model=("1", 0), image_embeds=("5", 0), text_embeds=("4", 0), steps=30, cfg=6.0),
        "7": node("WanVideoDecode", vae=("2", 0), samples=("6", 0), enable_vae_tiling=False, tile_x=272, tile_stride_x=144),
        "8": node("SaveVideo", images=("7", 0)),
    }
    prompt.update(changes)
    return prompt


def chain_of(prompt: object) -> Chain:
    return build_chain(prompt, VOCABULARY, planlab.library, RULES, planlab.card(100_000))


def plan_of(prompt: object, units: int) -> Plan:
    card = planlab.card(units)
    return make_plan(build_chain(prompt, VOCABULARY, planlab.library, RULES, card), card, RULES)


def phase(chain: Chain, kind: str) -> Phase:
    return next(found for found in chain.phases if found.kind == kind)


def test_a_wrapper_graph_has_its_phases_models_and_sizes() -> None:
    chain = chain_of(wrapper_prompt())
    assert [found.kind for found in chain.phases] == ["text_encode", "sample", "vae_decode"]
    sample, decode = phase(chain, "sample"), phase(chain, "vae_decode")
    assert (sample.width, sample.height, sample.frames, sample.steps, sample.cfg) == (832, 480, 81, 30, 6.0)
    assert (decode.width, decode.height, decode.frames, decode.tile) == (832, 480, 81, None)
    assert [model.role for model in chain.models] == ["text_encoder", "generator", "vae"]
    assert all(found.own_placement for found in chain.phases)
    assert chain.unknown == ()


def test_a_picture_is_encoded_at_full_length_and_a_part_of_the_steps_is_counted() -> None:
    prompt = wrapper_prompt(
        **{
            "5": node("WanVideoImageToVideoEncode", width=480, height=832, num_frames=49, vae=("2", 0), start_image=("9", 0)),
            "9": node("LoadImage", image="a.png"),
        }
    )
    prompt["6"]["inputs"]["start_step"] = 10
    chain = chain_of(prompt)
    encode, sample = phase(chain, "vae_encode"), phase(chain, "sample")
    assert (encode.width, encode.height, encode.frames) == (480, 832, 49)
    assert (sample.width, sample.frames, sample.steps) == (480, 49, 20)


@pytest.mark.parametrize("through", ["loader", "setter"])
def test_swapped_blocks_stay_off_the_card(through: str) -> None:
    prompt = wrapper_prompt(**{"10": node("WanVideoBlockSwap", blocks_to_swap=1)})
    if through == "loader":
        prompt["1"]["inputs"]["block_swap_args"] = ["10", 0]
    else:
        prompt["11"] = node("WanVideoSetBlockSwap", model=("1", 0), block_swap_args=("10", 0))
        prompt["6"]["inputs"]["model"] = ["11", 0]
    assert phase(chain_of(prompt), "sample").blocks_to_swap == 1
    assert phase(chain_of(wrapper_prompt()), "sample").blocks_to_swap == 0


def test_what_the_wrapper_places_does_not_give_way() -> None:
    """ComfyUI would stream such a model; the wrapper keeps what its settings say."""
    model = next(model for model in chain_of(wrapper_prompt()).models if model.role == "generator")
    weights = (model.resident_bytes or 0) // UNIT
    small, large = plan_of(wrapper_prompt(), weights // 2), plan_of(wrapper_prompt(), 100_000)
    assert small.verdict == "does_not_fit"
    sample = next(planned for planned in large.phases if planned.phase.kind == "sample")
    assert (sample.resident, sample.streamed) == (model.resident_bytes, 0)


def test_tiles_of_the_wrapper_are_read() -> None:
    prompt = wrapper_prompt()
    prompt["7"]["inputs"]["enable_vae_tiling"] = True
    tile = phase(chain_of(prompt), "vae_decode").tile
    assert tile is not None
    assert (tile.size, tile.overlap) == (272, 128)


def test_loras_of_the_wrapper_are_found_where_they_are_stacked() -> None:
    """Those of another strength than 0, those before them first."""
    prompt = wrapper_prompt(
        **{
            "20": node("WanVideoLoraSelect", lora="fast.safetensors", strength=1.0, prev_lora=("21", 0)),
            "21": node("WanVideoLoraSelectMulti", lora_0="style.safetensors", strength_0=0.5, lora_1="none", strength_1=1.0),
            "22": node(
                "WanVideoLoraSelectMulti", lora_0="off.safetensors", strength_0=0, lora_1="late.safetensors", strength_1=1
            ),
            "23": node("WanVideoSetLoRAs", model=("1", 0), lora=("22", 0)),
        }
    )
    prompt["1"]["inputs"]["lora"] = ["20", 0]
    prompt["6"]["inputs"]["model"] = ["23", 0]
    files = [lora.file for lora in phase(chain_of(prompt), "sample").loras]
    assert files == ["style.safetensors", "fast.safetensors", "late.safetensors"]


def test_weights_that_the_wrapper_casts_to_fp8_take_half() -> None:
    def weights(quantization: str) -> int:
        prompt = wrapper_prompt()
        prompt["1"]["inputs"]["quantization"] = quantization
        model = next(model for model in chain_of(prompt).models if model.role == "generator")
        return model.resident_bytes or 0

    assert weights("fp8_e4m3fn") == pytest.approx(weights("disabled") / 2, rel=0.01)
    # of a file that has its scales already it only says so
    assert weights("fp8_e4m3fn_scaled") == weights("disabled")


def test_the_wrappers_text_encoder_stays_off_the_card_where_its_node_says_cpu() -> None:
    prompt = wrapper_prompt()
    prompt["4"]["inputs"]["device"] = "cpu"
    assert [model.on_card for model in phase(chain_of(prompt), "text_encode").models] == [False]


def test_an_encode_node_that_loads_its_own_text_encoder_is_a_phase() -> None:
    prompt = wrapper_prompt(**{"4": node("WanVideoTextEncodeCached", model_name="umt5.safetensors", positive_prompt="x")})
    encode = phase(chain_of(prompt), "text_encode")
    assert ([model.file for model in encode.models], encode.own_placement) == (["umt5.safetensors"], True)


def test_the_wrappers_context_windows_bound_what_a_forward_sees() -> None:
    prompt = wrapper_prompt(**{"30": node("WanVideoContextOptions", context_frames=81, context_overlap=16)})
    prompt["5"]["inputs"]["num_frames"] = 321
    prompt["6"]["inputs"]["context_options"] = ["30", 0]
    sample = phase(chain_of(prompt), "sample")
    assert (sample.frames, sample.window) == (321, 21)


def test_nothing_has_to_be_assumed_of_the_wrappers_sampler() -> None:
    assert [said for said in chain_of(wrapper_prompt()).assumptions if "may change" in said] == []
