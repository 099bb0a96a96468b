"""From a prompt to a chain: who computes, with which models, at which shape, and what had to be assumed."""

import json
import random
from typing import Any

import planlab
import pytest
from planlab import UNIT, node
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.prompt import PromptError, Unknown, parse_prompt
from vram_headroom.vram.plan.report import check_report
from vram_headroom.vram.plan.types import Chain


def chain_of(prompt: object, targets: list[str] | None = None) -> Chain:
    return build_chain(prompt, planlab.VOCABULARY, planlab.library, planlab.RULES, planlab.card(100_000), targets)


def i2v_prompt(**changes: Any) -> dict[str, Any]:
    prompt = {
        "1": node("UNETLoader", unet_name="low_noise.safetensors", weight_dtype="default"),
        "2": node("VAELoader", vae_name="vae.safetensors"),
        "3": node("CLIPLoader", clip_name="umt5.safetensors"),
        "4": node("CLIPTextEncode", text="x", clip=("3", 0)),
        "5": node("CLIPVisionLoader", clip_name="vision.safetensors"),
        "6": node("LoadImage", image="a.png"),
        "7": node("CLIPVisionEncode", clip_vision=("5", 0), image=("6", 0)),
        "8": node(
            "WanImageToVideo",
            positive=("4", 0),
            negative=("4", 0),
            vae=("2", 0),
            width=832,
            height=480,
            length=81,
            batch_size=1,
            start_image=("6", 0),
        ),
        "9": node(
            "KSampler", model=("1", 0), seed=1, steps=20, cfg=6.0, positive=("8", 0), negative=("8", 1), latent_image=("8", 2)
        ),
        "10": node("VAEDecode", samples=("9", 0), vae=("2", 0)),
        "11": node("SaveVideo", images=("10", 0)),
        "12": node("SaveVideo", images=("7", 0)),
    }
    prompt.update(changes)
    return prompt


def test_two_experts_run_one_after_the_other_each_with_its_own_steps() -> None:
    chain = chain_of(planlab.two_experts())
    assert [(phase.kind, phase.node_id) for phase in chain.phases] == [
        ("text_encode", "89"),
        ("text_encode", "72"),
        ("sample", "81"),
        ("sample", "78"),
        ("vae_decode", "87"),
    ]
    high, low = chain.phases[2], chain.phases[3]
    assert (high.models[0].file, high.steps, high.cfg) == ("high_noise.safetensors", 10, 3.5)
    assert (low.models[0].file, low.steps, low.cfg) == ("low_noise.safetensors", 10, 3.5)
    assert (low.width, low.height, low.frames, low.batch) == (640, 640, 81, 1)
    assert (high.title, low.title) == ("Sampling (high noise)", "Sampling (low noise)")
    assert chain.assumptions == ()
    assert chain.unknown == ()


def test_the_switch_changes_loras_steps_and_cfg_and_its_other_branch_costs_nothing() -> None:
    slow, fast = chain_of(planlab.two_experts()), chain_of(planlab.two_experts(fast=True))
    assert sorted(model.role for model in slow.models) == ["generator", "generator", "text_encoder", "vae"]
    assert sorted(model.role for model in fast.models) == ["generator", "generator", "lora", "text_encoder", "vae"]
    high = fast.phases[2]
    assert [lora.file for lora in high.loras] == ["fast.safetensors"]
    assert (high.steps, high.cfg) == (2, 1.0)
    assert slow.phases[2].loras == ()


def test_loaders_of_the_same_file_and_options_are_one_model() -> None:
    prompt = planlab.two_experts()
    prompt["76"]["inputs"]["unet_name"] = "high_noise.safetensors"
    generators = [model for model in chain_of(prompt).models if model.role == "generator"]
    assert len(generators) == 1
    prompt["76"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    generators = [model for model in chain_of(prompt).models if model.role == "generator"]
    assert len(generators) == 2


def test_image_to_video_encodes_its_picture_and_its_vision_model() -> None:
    chain = chain_of(i2v_prompt())
    assert [phase.kind for phase in chain.phases] == ["text_encode", "vae_encode", "sample", "vae_decode", "clip_vision"]
    encode = chain.phases[1]
    assert (encode.width, encode.height, encode.frames) == (832, 480, 81)
    assert {model.role for model in chain.models} == {"text_encoder", "vae", "generator", "clip_vision"}


def test_without_a_picture_nothing_is_encoded() -> None:
    prompt = i2v_prompt()
    del prompt["8"]["inputs"]["start_image"]
    assert "vae_encode" not in [phase.kind for phase in chain_of(prompt).phases]


def test_only_the_outputs_asked_for_are_planned() -> None:
    chain = chain_of(i2v_prompt(), targets=["12"])
    assert [phase.kind for phase in chain.phases] == ["clip_vision"]
    assert "nothing would run" in chain_of(i2v_prompt(), targets=["404"]).unknown[0]


def test_dead_branches_are_not_planned() -> None:
    prompt = i2v_prompt()
    del prompt["11"], prompt["12"]
    prompt["13"] = node("SaveVideo", images=("6", 0))
    assert chain_of(prompt).phases == ()


def test_a_guider_carries_its_model_its_cfg_and_the_schedule_its_steps() -> None:
    custom = {
        "9": node("SamplerCustomAdvanced", guider=("20", 0), sigmas=("21", 0), latent_image=("8", 2)),
        "20": node("CFGGuider", model=("1", 0), positive=("8", 0), negative=("8", 1), cfg=4.5),
        "21": node("BasicScheduler", model=("1", 0), steps=12),
    }
    sample = next(phase for phase in chain_of(i2v_prompt(**custom)).phases if phase.kind == "sample")
    assert (sample.models[0].file, sample.steps, sample.cfg) == ("low_noise.safetensors", 12, 4.5)
    custom["20"] = node("BasicGuider", model=("1", 0), conditioning=("8", 0))
    sample = next(phase for phase in chain_of(i2v_prompt(**custom)).phases if phase.kind == "sample")
    assert sample.cfg == 1.0


def test_a_whole_checkpoint_is_sized_by_its_parts() -> None:
    whole = {name: node("CheckpointLoaderSimple", ckpt_name="whole.safetensors") for name in ("1",)}
    prompt = i2v_prompt(**whole)
    prompt["4"]["inputs"]["clip"] = ["1", 1]
    for name in ("8", "10"):
        prompt[name]["inputs"]["vae"] = ["1", 2]
    sizes = {model.role: model.file_bytes for model in chain_of(prompt).models if model.file == "whole.safetensors"}
    small = 2 * 128 * 2 + 64 * 128 * 2 + 128 * 16 * 4 * 2 + 512 * 2
    assert sizes == {"generator": 50 * UNIT + small, "text_encoder": 30 * UNIT + 2, "vae": 4 * UNIT}


def test_a_text_encoder_on_the_cpu_is_not_on_the_card() -> None:
    chain = chain_of(i2v_prompt(**{"3": node("CLIPLoader", clip_name="umt5.safetensors", device="cpu")}))
    assert [model.on_card for model in chain.models if model.role == "text_encoder"] == [False]


def test_merged_models_count_each_and_are_said() -> None:
    merged = {
        "9": node("KSampler", model=("30", 0), steps=5, cfg=1.0, positive=("8", 0), negative=("8", 1), latent_image=("8", 2)),
        "30": node("ModelMergeSimple", model1=("1", 0), model2=("31", 0), ratio=0.5),
        "31": node("UNETLoader", unet_name="high_noise.safetensors", weight_dtype="default"),
    }
    chain = chain_of(i2v_prompt(**merged))
    sample = next(phase for phase in chain.phases if phase.kind == "sample")
    assert {model.file for model in sample.models} == {"low_noise.safetensors", "high_noise.safetensors"}
    assert any("merges 2 models" in sentence for sentence in chain.assumptions)


def test_a_size_that_only_running_tells_is_an_assumption() -> None:
    prompt = planlab.two_experts()
    prompt["74"]["inputs"]["width"] = ["99", 0]
    prompt["99"] = node("RandomSize", seed=3)
    chain = chain_of(prompt)
    assert "the width that KSamplerAdvanced 81 works at is not known before it runs" in chain.assumptions
    assert next(phase for phase in chain.phases if phase.kind == "sample").width is None


def test_a_model_no_file_names_makes_the_verdict_unknown() -> None:
    chain = chain_of(i2v_prompt(**{"1": node("MagicModelMaker", seed=1)}))
    assert chain.unknown == ("MagicModelMaker 1 makes a MODEL that no file names, so it can't be sized",)


def test_a_missing_file_is_named_with_its_folder() -> None:
    chain = chain_of(i2v_prompt(**{"1": node("UNETLoader", unet_name="gone.safetensors", weight_dtype="default")}))
    assert chain.unknown == ("UNETLoader 1: gone.safetensors is not in models/diffusion_models",)


def test_a_missing_lora_is_an_assumption_only() -> None:
    prompt = planlab.two_experts(fast=True)
    prompt["83"]["inputs"]["lora_name"] = "gone.safetensors"
    chain = chain_of(prompt)
    assert chain.unknown == ()
    assert "LoraLoaderModelOnly 83: gone.safetensors is not in models/loras; it is not counted" in chain.assumptions


def test_an_unknown_node_class_makes_the_verdict_unknown() -> None:
    prompt = i2v_prompt(**{"10": node("NodeOfTomorrow", samples=("9", 0), vae=("2", 0))})
    assert chain_of(prompt).unknown == ("NodeOfTomorrow 10 is of a class this ComfyUI does not have",)


def test_a_loop_is_an_error_that_names_its_nodes() -> None:
    prompt = i2v_prompt()
    prompt["8"]["inputs"]["positive"] = ["9", 0]
    with pytest.raises(PromptError, match="9 -> 8 -> 9 form a loop"):
        chain_of(prompt)


@pytest.mark.parametrize("prompt", [None, [], {}, 5, "x", {"1": 5}, {"1": {"inputs": []}}, {"1": {"inputs": {}}}])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(PromptError):
        chain_of(prompt)


def test_a_saved_workflow_is_told_apart_from_a_prompt() -> None:
    with pytest.raises(PromptError, match="saved workflow"):
        chain_of({"nodes": [], "links": [], "version": 0.4})


@pytest.mark.parametrize(
    "inputs",
    [
        {"width": "wide", "height": 480, "length": 81},
        {"width": None, "height": [1, 2, 3], "length": {"a": 1}},
        {"width": -5, "height": 480, "length": 81},
        {"width": ["404", 0], "height": 480, "length": 81},
        {"width": True, "height": 480, "length": 10**30},
    ],
)
def test_values_of_a_wrong_type_are_said_and_never_crash(inputs: dict[str, Any]) -> None:
    prompt = planlab.two_experts()
    prompt["74"]["inputs"] = inputs
    prompt["75"]["inputs"]["unet_name"] = 4096
    prompt["81"]["inputs"]["steps"] = "many"
    prompt["500"] = {"inputs": {}}
    chain = chain_of(prompt)
    assert any("81" in sentence for sentence in chain.assumptions)
    assert chain.unknown


def test_a_wrapped_array_widget_is_a_value_and_no_link() -> None:
    graph = parse_prompt({"1": node("PrimitiveInt", value={"__value__": ["2", 0]})}, planlab.VOCABULARY)
    assert graph.value("1", "value") == ["2", 0]
    assert graph.link("1", "value") is None


def test_values_come_through_a_long_row_of_primitives_and_reroutes() -> None:
    prompt = {"0": node("PrimitiveInt", value=7)}
    prompt |= {str(i): {"class_type": "Reroute", "inputs": {"": [str(i - 1), 0]}} for i in range(1, 60)}
    graph = parse_prompt(prompt | {"x": node("RandomSize", seed=("59", 0))}, planlab.VOCABULARY)
    assert graph.value("x", "seed") == 7
    looped = parse_prompt({"1": node("PrimitiveInt", value=("1", 0))}, planlab.VOCABULARY)
    assert isinstance(looped.value("1", "value"), Unknown)


def test_a_row_of_five_thousand_nodes_is_no_trouble() -> None:
    prompt = planlab.two_experts()
    for i in range(5000):
        source = ("75", 0) if i == 0 else (f"s{i - 1}", 0)
        prompt[f"s{i}"] = node("ModelSamplingSD3", model=source, shift=1.0)
    prompt["86"]["inputs"]["model"] = ["s4999", 0]
    chain = chain_of(prompt)
    assert chain.phases[2].models[0].file == "high_noise.safetensors"


def upscaled(**upscale: Any) -> dict[str, Any]:
    prompt = planlab.two_experts()
    prompt["60"] = upscale["node"]
    prompt["78"]["inputs"]["latent_image"] = ["60", 0]
    return prompt


def test_an_upscale_between_the_experts_keeps_the_frames() -> None:
    chain = chain_of(upscaled(node=node("LatentUpscale", samples=("81", 0), width=1280, height=720)))
    high, low, decode = chain.phases[2:]
    assert (high.width, high.height, high.frames) == (640, 640, 81)
    assert (low.width, low.height, low.frames, low.batch) == (1280, 720, 81, 1)
    assert (decode.width, decode.height, decode.frames) == (1280, 720, 81)
    assert chain.assumptions == ()


def test_an_upscale_by_a_factor_is_followed() -> None:
    chain = chain_of(upscaled(node=node("LatentUpscaleBy", samples=("81", 0), scale_by=1.5)))
    assert (chain.phases[3].width, chain.phases[3].height, chain.phases[3].frames) == (960, 960, 81)


def test_latents_are_followed_through_trimming_joining_and_cutting() -> None:
    def frames(**entry: Any) -> tuple[int | None, int | None, int | None]:
        chain = chain_of(upscaled(**entry))
        assert chain.assumptions == ()
        low = chain.phases[3]
        return (low.frames, low.width, low.batch)

    assert frames(node=node("TrimVideoLatent", samples=("81", 0), trim_amount=3)) == (69, 640, 1)
    assert frames(node=node("LatentConcat", samples1=("81", 0), samples2=("74", 0), dim="t")) == (165, 640, 1)
    assert frames(node=node("LatentConcat", samples1=("81", 0), samples2=("74", 0), dim="-x")) == (81, 1280, 1)
    assert frames(node=node("LatentCut", samples=("81", 0), dim="t", index=0, amount=2)) == (5, 640, 1)
    assert frames(node=node("LatentCutToBatch", samples=("81", 0), dim="t", slice_size=1)) == (1, 640, 21)
    assert frames(node=node("RepeatLatentBatch", samples=("81", 0), amount=3)) == (81, 640, 3)


def test_what_may_change_a_latent_unseen_is_an_assumption() -> None:
    chain = chain_of(upscaled(node=node("SomebodysLatentFilter", samples=("81", 0))))
    assert chain.assumptions == ("SomebodysLatentFilter 60 may change the size of its latent; it counts as unchanged",)


def test_a_reference_picture_alone_is_encoded_as_one_frame() -> None:
    prompt = i2v_prompt()
    prompt["8"]["class_type"] = "WanReferenceToVideo"
    prompt["8"]["inputs"]["ref_image"] = prompt["8"]["inputs"].pop("start_image")
    encode = next(phase for phase in chain_of(prompt).phases if phase.kind == "vae_encode")
    assert (encode.width, encode.frames) == (832, 1)


def test_a_size_that_a_node_passes_on_by_name_is_followed_and_said() -> None:
    prompt = planlab.two_experts()
    prompt["61"] = node("SomebodysCamera", width=832, height=480)
    prompt["74"]["inputs"]["width"] = ["61", 1]
    chain = chain_of(prompt)
    assert chain.phases[2].width == 832
    assert chain.assumptions == ("SomebodysCamera 61 passes its width on unchanged",)


def test_models_of_other_types_are_counted_with_what_loads_them() -> None:
    patched = i2v_prompt()
    patched["40"] = node("ModelPatchLoader", name="patch.safetensors")
    patched["41"] = node("PatchModel", model=("1", 0), patch=("40", 0))
    patched["9"]["inputs"]["model"] = ["41", 0]
    sample = next(phase for phase in chain_of(patched).phases if phase.kind == "sample")
    assert [(model.file, model.role) for model in sample.models] == [
        ("low_noise.safetensors", "generator"),
        ("patch.safetensors", "other"),
    ]


def test_a_diamond_of_switches_is_no_trouble() -> None:
    prompt = i2v_prompt()
    prompt["99"] = node("RandomSize", seed=3)
    source = ("1", 0)
    for i in range(200):
        prompt[f"s{i}"] = node("ComfySwitchNode", switch=("99", 0), on_false=source, on_true=source)
        source = (f"s{i}", 0)
    prompt["9"]["inputs"]["model"] = list(source)
    sample = next(phase for phase in chain_of(prompt).phases if phase.kind == "sample")
    assert {model.file for model in sample.models} == {"low_noise.safetensors"}


def test_no_mutation_of_a_prompt_raises_anything_but_a_prompt_error() -> None:
    odd = [None, True, -1, 10**400, float("nan"), float("inf"), "x", "", [], {}, ["81", 10**400], ["81", -9], ["404", 0]]
    odd += [["81", float("inf")], ["70", 0.5], {"__value__": ["1", 0]}, "9**4000", ["127", 1], ["122", 0]]
    chance = random.Random(7)
    for _ in range(3_000):
        prompt = planlab.two_experts(fast=chance.random() < 0.5)
        for _ in range(chance.randint(1, 4)):
            target = prompt[chance.choice(list(prompt))]
            if chance.random() < 0.1:
                target["class_type"] = chance.choice([None, 5, "Nope", *planlab.VOCABULARY])
            elif target["inputs"]:
                target["inputs"][chance.choice(list(target["inputs"]))] = chance.choice(odd)
        card = planlab.card(chance.choice([100, 6_000, 50_000]))
        try:
            chain = build_chain(prompt, planlab.VOCABULARY, planlab.library, planlab.RULES, card)
        except PromptError:
            continue
        answer = check_report(make_plan(chain, card, planlab.RULES))
        json.dumps(answer, allow_nan=False)
