"""The planner knows the pack's own nodes: loaders, gates and policies plan to what they do, and fixes turn their widgets."""

import copy
from dataclasses import replace
from typing import Any

import planlab
import pytest
from host.process import start_host
from planlab import RULES, node, two_experts
from prompts import official, with_our_loaders
from test_advice import VOCABULARY as STOCK
from test_advice import wide_library
from vram_headroom.vram.decoding import SMALLEST_TILE
from vram_headroom.vram.estimate.checkpoint import Checkpoint
from vram_headroom.vram.plan.advice import Context, Fix, advise
from vram_headroom.vram.plan.bench import Bench
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.knobs import fp8_weights, smaller_files, text_encoder_on_cpu
from vram_headroom.vram.plan.needs import largest_tiles
from vram_headroom.vram.plan.patch import ReplaceNode, SetInput, apply
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.tiles import tiled_at_once, tiled_decode
from vram_headroom.vram.plan.types import Card, Chain, Earlier, HostRules, NodeSpec, Phase, Plan

Prompt = dict[str, Any]
OURS = "VRAMHeadroom"
HIGH, LOW = "high_noise.safetensors", "low_noise.safetensors"
SOCKETS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "clip_vision": "CLIP_VISION"}
VOCABULARY = {
    **STOCK,
    **{
        f"{OURS}{ours}": STOCK[stock]._replace(inputs={**STOCK[stock].inputs, "pipeline": "STRING"})
        for ours, stock in {
            "LoadDiffusionModel": "UNETLoader",
            "LoadTextEncoder": "CLIPLoader",
            "LoadVAE": "VAELoader",
            "LoadCLIPVision": "CLIPVisionLoader",
        }.items()
    },
    f"{OURS}LoadPipeline": NodeSpec(
        {
            **dict.fromkeys(("high_noise_model", "low_noise_model", "weight_dtype", "text_encoder"), "COMBO"),
            **dict.fromkeys(("vae", "clip_vision"), "COMBO"),
            "pipeline": "STRING",
            "text_encoder_device": "COMBO",
        },
        ("MODEL", "MODEL", "CLIP", "VAE", "CLIP_VISION"),
    ),
    f"{OURS}Gate": NodeSpec({"value": "*", "if_it_does_not_fit": "COMBO"}, ("*",)),
    f"{OURS}OffloadNow": NodeSpec({"value": "*", "what": "COMBO"}, ("*",)),
    f"{OURS}RegisterModel": NodeSpec({"pipeline": "STRING", **SOCKETS}, tuple(SOCKETS.values())),
    f"{OURS}ComponentPolicy": NodeSpec({"policy": "COMBO", "priority": "INT", **SOCKETS}, tuple(SOCKETS.values())),
    f"{OURS}VAEDecode": NodeSpec({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
}
CARD = planlab.card(16_000)


def library(folder: str, name: str) -> Checkpoint:
    """The wide experts, and smaller files of theirs and of the text encoder."""
    if name in ("high_noise_fp8.safetensors", "low_noise_fp8.safetensors"):
        return planlab.wan_dit(f"/m/{name}", 6000, dim=5120, dtype="F8_E4M3")
    return wide_library(folder, name)


def chain_of(prompt: Prompt, rules: HostRules = RULES) -> Chain:
    return build_chain(prompt, VOCABULARY, library, rules, CARD)


def plan_of(prompt: Prompt, card: Card = CARD, rules: HostRules = RULES) -> Plan:
    return make_plan(build_chain(prompt, VOCABULARY, library, rules, card), card, rules)


def essence(plan: Plan) -> tuple[object, ...]:
    """What a plan says, but for which node loads and through which nodes a model goes."""

    def bare(phase: Phase) -> tuple[object, ...]:
        models = tuple((m.role, m.file, m.resident_bytes, m.file_bytes, m.on_card, m.patches != "") for m in phase.models)
        kinds = (phase.kind, phase.node_id, phase.title, models, phase.width, phase.height, phase.frames, phase.batch)
        return (*kinds, phase.steps, phase.cfg, phase.window, phase.tile)

    phases = tuple((bare(p.phase), p.activation, p.resident, p.streamed, p.others, p.available, p.short) for p in plan.phases)
    weights = tuple(sorted((m.role, m.file, m.resident_bytes or 0, m.on_card) for m in plan.models))
    return phases, weights, plan.verdict, plan.new_bytes, plan.runs


def swapped(prompt: Prompt, links: dict[str, list[Any]]) -> Prompt:
    """Links from these nodes' first outputs come from elsewhere, and the nodes are gone."""
    changed = {key: copy.deepcopy(value) for key, value in prompt.items() if key not in links}
    for value in changed.values():
        for name, link in value["inputs"].items():
            if isinstance(link, list) and link[0] in links and link[1] == 0:
                value["inputs"][name] = links[link[0]]
    return changed


def with_pipeline(prompt: Prompt, **inputs: object) -> Prompt:
    """The experts 75 and 76, the text encoder 71 and the VAE 73 come out of one loader."""
    outputs = {"75": ["900", 0], "76": ["900", 1], "71": ["900", 2], "73": ["900", 3]}
    chosen = {
        "high_noise_model": HIGH,
        "low_noise_model": LOW,
        "weight_dtype": "default",
        "text_encoder": "umt5.safetensors",
        "vae": "vae.safetensors",
        "clip_vision": "none",
        "text_encoder_device": "default",
    }
    return {"900": node(f"{OURS}LoadPipeline", **{**chosen, **inputs}), **swapped(prompt, outputs)}


def with_input(prompt: Prompt, node_id: str, **inputs: object) -> Prompt:
    return {**prompt, node_id: {**prompt[node_id], "inputs": {**prompt[node_id]["inputs"], **inputs}}}


def test_a_pipeline_loader_plans_as_the_single_loaders_do() -> None:
    for units in (16_000, 7_000, 3_000):
        card = planlab.card(units)
        assert essence(plan_of(with_pipeline(two_experts()), card)) == essence(plan_of(two_experts(), card))


def test_a_pipeline_of_one_model_is_one_model() -> None:
    single = with_input(two_experts(), "76", unet_name=HIGH)
    plan = plan_of(with_pipeline(two_experts(), low_noise_model="none"))
    assert essence(plan) == essence(plan_of(single))
    assert [model.file for model in plan.models if model.role == "generator"] == [HIGH]


def test_the_options_of_a_pipeline_loader_count() -> None:
    on_cpu = with_input(two_experts(), "71", device="cpu")
    assert essence(plan_of(with_pipeline(two_experts(), text_encoder_device="cpu"))) == essence(plan_of(on_cpu))
    assert essence(plan_of(on_cpu)) != essence(plan_of(two_experts()))
    fp8 = two_experts()
    for loader in ("75", "76"):
        fp8 = with_input(fp8, loader, weight_dtype="fp8_e4m3fn")
    assert essence(plan_of(with_pipeline(two_experts(), weight_dtype="fp8_e4m3fn"))) == essence(plan_of(fp8))
    assert essence(plan_of(fp8)) != essence(plan_of(two_experts()))


def seen(loader: dict[str, Any] | None) -> Prompt:
    prompt = {**two_experts(), "200": node("LoadImage", image="a.png")}
    prompt["201"] = node("CLIPVisionEncode", clip_vision=("202", 0), image=("200", 0))
    prompt["203"] = node("SaveVideo", images=("201", 0))
    return {**prompt, "202": loader} if loader else prompt


def test_an_image_encoder_of_a_pipeline_loader_is_counted_where_one_is_chosen() -> None:
    single = seen(node("CLIPVisionLoader", clip_name="vision.safetensors"))
    prompt = with_pipeline(swapped(seen(None), {}), clip_vision="vision.safetensors")
    prompt["201"]["inputs"]["clip_vision"] = ["900", 4]
    assert essence(plan_of(prompt)) == essence(plan_of(single))
    assert any(phase.kind == "clip_vision" for phase in chain_of(prompt).phases)
    none = with_input(prompt, "900", clip_vision="none")
    assert [model for model in chain_of(none).models if model.role == "clip_vision"] == []


LINKS = {
    "MODEL": ("86", "model"),
    "CONDITIONING": ("81", "positive"),
    "LATENT": ("78", "latent_image"),
    "IMAGE": ("80", "images"),
}


@pytest.mark.parametrize("kind", [*LINKS, "INT"])
@pytest.mark.parametrize("class_type", ["Gate", "OffloadNow"])
def test_a_node_on_the_way_changes_nothing_of_a_plan(class_type: str, kind: str) -> None:
    prompt = {**two_experts(), "300": node("PrimitiveInt", value=640)}
    prompt = with_input(prompt, "74", width=["300", 0])
    reader, name = {**LINKS, "INT": ("74", "width")}[kind]
    widget = {"if_it_does_not_fit": "stop"} if class_type == "Gate" else {"what": "text encoders"}
    gated = with_input(prompt, reader, **{name: ["301", 0]})
    gated["301"] = node(f"{OURS}{class_type}", value=tuple(prompt[reader]["inputs"][name]), **widget)
    for units in (16_000, 7_000):
        card = planlab.card(units)
        plan = plan_of(gated, card)
        assert essence(plan) == essence(plan_of(prompt, card))
        assert plan.assumptions == plan_of(prompt, card).assumptions


def passed_through(class_type: str, **inputs: object) -> Prompt:
    """Every model goes through one node, each by its own slot."""
    single = seen(node("CLIPVisionLoader", clip_name="vision.safetensors"))
    slots = {"75": 0, "71": 1, "73": 2, "202": 3}
    prompt = swapped(single, {loader: ["400", slot] for loader, slot in slots.items()})
    prompt |= {loader: single[loader] for loader in slots}
    sockets = {name: (loader, 0) for name, loader in zip(SOCKETS, slots, strict=True)}
    return {**prompt, "400": node(class_type, **sockets, **inputs)}


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [("RegisterModel", {"pipeline": "wan"}), ("ComponentPolicy", {"policy": "pinned to the card", "priority": 1})],
)
def test_models_go_through_a_node_by_every_slot(class_type: str, inputs: dict[str, Any]) -> None:
    through, plain = (
        chain_of(passed_through(OURS + class_type, **inputs)),
        chain_of(seen(node("CLIPVisionLoader", clip_name="vision.safetensors"))),
    )
    assert essence(make_plan(through, CARD, RULES)) == essence(make_plan(plain, CARD, RULES))
    ruled = {next(m.role for m in through.models if m.key == key): by for key, by in through.ruled}
    roles = ("generator", "text_encoder", "vae", "clip_vision")
    assert ruled == (dict.fromkeys(roles, "400") if class_type == "ComponentPolicy" else {})


def test_our_decode_is_a_decode() -> None:
    prompt = two_experts()
    ours = {**prompt, "87": {**prompt["87"], "class_type": f"{OURS}VAEDecode"}}
    assert essence(plan_of(ours)) == essence(plan_of(prompt))
    assert chain_of(ours).phases[-1].kind == "vae_decode"


def test_our_decode_is_planned_in_the_largest_tiles_that_fit() -> None:
    prompt = two_experts()
    ours = {**prompt, "87": {**prompt["87"], "class_type": f"{OURS}VAEDecode"}}
    sides: set[int] = set()
    for card in map(planlab.card, range(800, 9000, 100)):
        stock, planned = plan_of(prompt, card).phases[-1], plan_of(ours, card).phases[-1]
        assert stock.activation is not None
        assert planned.activation is not None
        if stock.tiled is None or planned.tiled == stock.tiled:
            assert planned.activation == stock.activation
            continue
        assert planned.tiled is not None
        sides.add(planned.tiled.size)
        fits = planned.activation.upper <= planned.available
        assert fits or planned.tiled.size == SMALLEST_TILE
        larger = largest_tiles(planned.phase, RULES, planned.available * 2)
        assert larger is not None
        assert larger[0].size >= planned.tiled.size
    assert len(sides) > 3


# advice


def fixes_for(prompt: Prompt, units: int) -> dict[str, Fix]:
    card = planlab.card(units)
    files = {
        "diffusion_models": [HIGH, LOW, "high_noise_fp8.safetensors", "low_noise_fp8.safetensors"],
        "text_encoders": ["umt5.safetensors"],
    }
    context = Context(VOCABULARY, library=library, files=lambda folder: files.get(folder, []), rules=RULES)
    plan = plan_of(prompt, card)
    assert plan.verdict != "fits"
    fixes = advise(prompt, plan, lambda changed: plan_of(dict(changed), card), context)
    for fix in fixes:
        if fix.changes:
            again = plan_of(apply(prompt, fix.changes), card)
            assert (again.verdict, again.message) == (fix.verdict, fix.plan.message), fix.id
    return {fix.id: fix for fix in fixes}


def settings_of(fix: Fix) -> dict[str, object]:
    return {f"{change.node_id}.{change.input}": change.value for change in fix.changes if isinstance(change, SetInput)}


def test_a_smaller_file_is_put_into_the_right_widget() -> None:
    for prompt, widgets in (
        (with_pipeline(two_experts()), ("900.high_noise_model", "900.low_noise_model")),
        (with_pipeline(two_experts(), low_noise_model="none"), ("900.high_noise_model",)),
        (with_our(two_experts()), ("75.unet_name", "76.unet_name")),
    ):
        files = [HIGH, LOW, "high_noise_fp8.safetensors", "low_noise_fp8.safetensors"]
        bench = Bench(prompt, plan_of(prompt), VOCABULARY, library, lambda folder, files=files: files)
        (knob,) = smaller_files(bench, "generator")
        turn = knob.turn(0)
        assert turn is not None
        changes = [change for change in turn.changes if isinstance(change, SetInput)]
        set_to = dict(zip(widgets, files[2:], strict=False))
        assert {f"{change.node_id}.{change.input}": change.value for change in changes} == set_to
        after = plan_of(apply(prompt, turn.changes))
        assert {model.file for model in after.models if model.role == "generator"} == set(set_to.values())


def with_our(prompt: Prompt) -> Prompt:
    return with_our_loaders(prompt)


def test_a_text_encoder_goes_to_the_cpu_by_the_right_widget() -> None:
    for prompt, node_id, device, dtypes in (
        (with_pipeline(two_experts()), "900", "text_encoder_device", {"900.weight_dtype": "fp8_e4m3fn"}),
        (with_our(two_experts()), "71", "device", {"75.weight_dtype": "fp8_e4m3fn", "76.weight_dtype": "fp8_e4m3fn"}),
    ):
        bench = Bench(prompt, plan_of(prompt), VOCABULARY, library)
        (knob,) = text_encoder_on_cpu(bench)
        turn = knob.turn(0)
        assert turn is not None
        assert turn.changes == (SetInput(node_id, device, "cpu"),)
        changed = plan_of(apply(prompt, turn.changes))
        assert [model.on_card for model in changed.models if model.role == "text_encoder"] == [False]
        (cast,) = fp8_weights(bench)
        found = cast.turn(0)
        assert found is not None
        assert {f"{c.node_id}.{c.input}": c.value for c in found.changes if isinstance(c, SetInput)} == dtypes
        bytes_before, bytes_after = (
            sum(m.resident_bytes or 0 for m in plan.models if m.role == "generator")
            for plan in (plan_of(prompt), plan_of(apply(prompt, found.changes)))
        )
        assert bytes_after < bytes_before * 0.6


def test_our_decode_is_never_replaced_by_a_tiled_one() -> None:
    """It turns to tiles by itself, and only when it must."""
    prompt = two_experts()
    ours = {**prompt, "87": {**prompt["87"], "class_type": f"{OURS}VAEDecode"}}
    card = next(card for card in map(planlab.card, range(800, 9000, 100)) if plan_of(prompt, card).phases[-1].tiled)

    def replaced(graph: Prompt) -> set[str]:
        bench = Bench(graph, plan_of(graph, card), VOCABULARY, library)
        turns = [knob.turn(0) for knob in (*tiled_decode(bench), *tiled_at_once(bench))]
        return {change.node_id for turn in turns if turn for change in turn.changes if isinstance(change, ReplaceNode)}

    assert replaced(prompt) == {"87"}
    assert replaced(ours) == set()


def test_a_size_behind_a_gate_is_still_set_at_its_constant() -> None:
    prompt = {**two_experts(), "300": node("PrimitiveInt", value=81), "301": node(f"{OURS}Gate", value=("300", 0))}
    prompt = with_input(prompt, "74", length=["301", 0])
    fixes = fixes_for(prompt, 900)
    shorter = next(fix for name, fix in fixes.items() if "shorter_video" in name)
    assert settings_of(shorter)["300.value"] < 81  # type: ignore[operator]


# as a host answers


STATUS = "/api/v1/hardware/vram"


def test_over_rest_pins_and_the_pipeline_loader_are_planned() -> None:
    stock = official("video_wan2_2_14B_t2v")
    by_class: dict[str, list[str]] = {}
    for key, value in stock.items():
        by_class.setdefault(value["class_type"], []).append(key)
    high, low = sorted(by_class["UNETLoader"], key=lambda key: "high" not in stock[key]["inputs"]["unet_name"])[:2]
    (text,), (vae,) = by_class["CLIPLoader"], by_class["VAELoader"]
    outputs = {high: ["900", 0], low: ["900", 1], text: ["900", 2], vae: ["900", 3]}
    pipeline = swapped(stock, outputs)
    pipeline["900"] = node(
        f"{OURS}LoadPipeline",
        high_noise_model=stock[high]["inputs"]["unet_name"],
        low_noise_model=stock[low]["inputs"]["unet_name"],
        weight_dtype="default",
        text_encoder=stock[text]["inputs"]["clip_name"],
        vae=stock[vae]["inputs"]["vae_name"],
        clip_vision="none",
    )
    with start_host(vram_gb=16) as host:
        first, second = (host.post(f"{STATUS}/check", prompt).body for prompt in (stock, pipeline))
        for name in ("verdict", "message", "new_bytes"):
            assert first.get(name) == second.get(name), name
        numbers = ("kind", "node_id", "resident_bytes", "streamed_bytes", "other_models_bytes", "short_bytes")
        phases = [[[phase.get(name) for name in numbers] for phase in answer["phases"]] for answer in (first, second)]
        assert phases[0] == phases[1]
        bare, pinned = (host.post(f"{STATUS}/check", prompt).body for prompt in decoded_and_sampled_again())
        for answer, kept in ((bare, 0), (pinned, vae_bytes(pinned))):
            assert [phase["kind"] for phase in answer["phases"]][-3:] == ["vae_encode", "sample", "vae_decode"]
            assert answer["phases"][-2]["other_models_bytes"] == kept


def decoded_and_sampled_again() -> tuple[Prompt, Prompt]:
    """The VAE is on the card when a model comes that fills it: it leaves, and in the second graph a policy node pins it."""
    stock = official("text_to_video_wan")
    classes = {value["class_type"]: key for key, value in stock.items()}
    sampler, decode, vae = (classes[name] for name in ("KSampler", "VAEDecode", "VAELoader"))
    prompt = {**swapped(stock, {decode: ["903", 0]}), decode: stock[decode]}
    prompt["900"] = node("UNETLoader", unet_name="wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", weight_dtype="default")
    prompt["901"] = node("VAEEncode", pixels=(decode, 0), vae=(vae, 0))
    prompt["902"] = {**stock[sampler], "inputs": {**stock[sampler]["inputs"], "model": ["900", 0], "latent_image": ["901", 0]}}
    prompt["903"] = node("VAEDecode", samples=("902", 0), vae=(vae, 0))
    pinned = {**swapped(prompt, {vae: ["904", 2]}), vae: stock[vae]}
    pinned["904"] = node(f"{OURS}ComponentPolicy", policy="pinned to the card", priority=1, vae=(vae, 0))
    return prompt, pinned


def vae_bytes(answer: dict[str, Any]) -> int:
    return next(phase["resident_bytes"] for phase in answer["phases"] if phase["kind"] == "vae_decode")


def test_a_pin_of_the_graph_holds_in_the_replay() -> None:
    """The models that a policy node rules are those that the pack hands to the planner as pinned."""
    chain = chain_of(passed_through(f"{OURS}ComponentPolicy", policy="pinned to the card", priority=1))
    vae = next(model for model in chain.models if model.role == "vae")
    assert vae.key in dict(chain.ruled)
    again, tight = Earlier(chain), planlab.card(6_600)
    free = make_plan(chain, tight, RULES, before=(again,))
    kept = make_plan(chain, tight, RULES, pinned=frozenset({vae.key}), before=(replace(again, pinned=frozenset({vae.key})),))
    assert any(vae.file in planned.leaving for planned in free.phases)
    assert not any(vae.file in planned.leaving for planned in kept.phases)
