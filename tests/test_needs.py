"""What a phase needs, by how its model's weights are kept: figures of the real classes, traced with those weights."""

from __future__ import annotations

import json
from dataclasses import replace

import headers
import pytest
from host.checkpoints import header_of
from vram_headroom.vram.estimate.architecture import identify
from vram_headroom.vram.estimate.backend import Backend
from vram_headroom.vram.estimate.checkpoint import Checkpoint, TensorInfo
from vram_headroom.vram.estimate.dit import dit_forward
from vram_headroom.vram.estimate.estimate import Estimate
from vram_headroom.vram.estimate.footprint import LoadRules, diffusion_model, text_encoder
from vram_headroom.vram.estimate.tokens import Video
from vram_headroom.vram.plan.needs import dit_shape, need_of
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.sizing import load_rules
from vram_headroom.vram.plan.types import Card, Chain, HostRules, ModelRef, Phase

MIB, GIB = 1 << 20, 1 << 30
RULES = HostRules(version="0.33.0", backend=Backend((0, 33, 0), True, True))
EIGHT = HostRules(version="0.8.0", backend=Backend((0, 8, 0), True, True))
ADA, AMPERE = LoadRules.of_card((8, 9), 24 * GIB, GIB), LoadRules.of_card((8, 6), 24 * GIB, GIB)
CARD = Card("24 GB", 24 * GIB, 24 * GIB)


def official(name: str) -> Checkpoint:
    return headers.checkpoint({key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header_of(name).items()})


def sampling(rules: LoadRules, name: str = "wan2.2_t2v_high_noise_14B_fp8_scaled") -> Phase:
    """Sampling 81 frames at 480p with cfg 1."""
    read = official(name)
    found = diffusion_model(read, rules=rules)
    model = ModelRef("1", "generator", name, name, read.file_bytes, found.resident, "WAN", arch=identify(read), footprint=found)
    return Phase("sample", "2", "KSampler", (model,), width=832, height=480, frames=81, cfg=1.0)


def forward_of(told: Estimate) -> float:
    """MiB of the forward alone: what a step holds around it is not in the traces of one."""
    around = ("sampler's latents", "results of the conditions", "model input", "conditions")
    return sum(term.bytes for term in told.terms if term.name not in around) / MIB


@pytest.mark.parametrize(
    ("host", "weights", "traced"),
    [(RULES, ADA, 3480.28), (RULES, AMPERE, 3183.38), (EIGHT, ADA, 2728.46), (EIGHT, AMPERE, 2728.46)],
)
def test_a_forward_over_fp8_scaled_weights_is_that_of_the_real_classes(
    host: HostRules, weights: LoadRules, traced: float
) -> None:
    """WanModel of 14B with four blocks of fp8 weights, torch 2.13: a card that multiplies fp8 takes its input as fp8 too, one
    that does not unpacks a weight. 81 frames of 832 x 480, kernels fused."""
    phase = sampling(weights)
    required = need_of(phase, host).required
    assert required is not None
    shape = dit_shape(phase.models[0].arch, phase)
    plain = dit_forward(shape, Video(832, 480, 81), host.backend)
    assert forward_of(required) == pytest.approx(traced, rel=0.0005)
    assert forward_of(required) >= plain.expected / MIB - 0.01


@pytest.mark.parametrize(("format_", "traced"), [("int8_tensorwise", 4568), ("convrot_w4a4", 8559), ("float8_e4m3fn", 3480)])
def test_products_of_integers_have_a_band_that_holds_the_chain_without_their_kernel(format_: str, traced: int) -> None:
    """MiB of the real WanModel of 14B, 4 blocks, traced without kernels for integers; 81 frames of 832 x 480."""
    phase = sampling(ADA)
    (model,) = phase.models
    read = official("wan2.2_t2v_high_noise_14B_fp8_scaled")
    conf = {name.removesuffix(".scale_weight"): {"format": format_} for name in read.tensors if name.endswith(".scale_weight")}
    marked = {"_quantization_metadata": json.dumps({"layers": conf})}
    tensors = {name: tensor for name, tensor in read.tensors.items() if name != "scaled_fp8"}
    found = diffusion_model(replace(read, tensors=tensors, metadata=marked), rules=ADA)
    phase = replace(phase, models=(replace(model, footprint=found),))
    required, plain = need_of(phase, RULES).required, need_of(sampling(ADA), RULES).required
    assert required is not None
    assert plain is not None
    assert required.expected == plain.expected
    assert required.upper / MIB >= traced
    assert any("integers" in said for said in required.assumptions) == (format_ != "float8_e4m3fn")


def test_an_unpacked_weight_is_counted_once() -> None:
    phase = sampling(AMPERE)
    plan = make_plan(Chain((phase,), phase.models), CARD, RULES)
    activation = plan.phases[0].activation
    required = need_of(phase, RULES).required
    assert activation is not None
    assert required is not None
    assert activation.expected == required.expected


def test_a_packed_layer_is_unpacked_by_its_loader_and_not_cast_as_well() -> None:
    phase = sampling(ADA)
    (model,) = phase.models
    tensors = {
        name: TensorInfo(name, "Q8_0", tensor.shape, tensor.elements * 34 // 32) if len(tensor.shape) == 2 else tensor
        for name, tensor in official("wan2.2_t2v_high_noise_14B_fp16").tensors.items()
    }
    read = replace(official("wan2.2_t2v_high_noise_14B_fp16"), tensors=tensors, format="gguf")
    phase = replace(phase, models=(replace(model, footprint=diffusion_model(read, rules=ADA)),))
    activation = make_plan(Chain((phase,), phase.models), CARD, RULES).phases[0].activation
    assert activation is not None
    held = {term.name: term.bytes for term in activation.terms}
    assert held["the block's largest weight, unpacked"] == 2 * 13824 * 5120
    assert "weight cast buffer" not in held


@pytest.mark.parametrize(
    ("embedding", "layers", "gib"), [("F16", "F16", 0.37), ("F16", "F8_E4M3", 0.38), ("F8_E4M3", "F8_E4M3", 3.92)]
)
def test_a_vocabulary_in_fp8_is_cast_as_a_whole(embedding: str, layers: str, gib: float) -> None:
    """Files of plain fp8; those of Comfy-Org keep their table of words in 16 bit."""
    read = headers.recorded_checkpoint(headers.recorded("variants")["UMT5-XXL"])
    tensors = {
        name: (embedding if name == "shared.weight" else layers if len(tensor.shape) == 2 else "F8_E4M3", tensor.shape)
        for name, tensor in read.tensors.items()
    }
    if layers == "F16" or embedding == "F16":
        tensors["encoder.final_layer_norm.weight"] = ("F16", (4096,))
    made = headers.checkpoint(tensors)
    found = text_encoder(made, rules=ADA)
    model = ModelRef("1", "text_encoder", "u", "u", 1, found.resident, "UMT5-XXL", arch=identify(made), footprint=found)
    required = need_of(Phase("text_encode", "2", "CLIPTextEncode", (model,)), RULES).required
    assert required is not None
    assert required.expected / GIB == pytest.approx(gib, abs=0.02)


def test_weights_are_weighed_in_the_type_they_are_kept_in_and_run_in_the_one_they_are_cast_to() -> None:
    pascal = replace(RULES, compute_bytes=4, backend=replace(RULES.backend, element_bytes=4, weight_bytes=2))
    rules = load_rules(pascal, CARD)
    assert (rules.weight_bytes, rules.compute_bytes) == (2, 4)
    assert load_rules(RULES, CARD).weight_bytes == 2
    assert load_rules(replace(RULES, compute_bytes=4), CARD).weight_bytes == 4
    phase = sampling(rules, "wan2.1_t2v_14B_fp16")
    assert phase.models[0].resident_bytes == diffusion_model(official("wan2.1_t2v_14B_fp16")).resident
    told = need_of(phase, pascal).required
    half = need_of(sampling(ADA, "wan2.1_t2v_14B_fp16"), RULES).required
    assert told is not None
    assert half is not None
    assert told.expected > 1.7 * half.expected
    assert {term.name for term in told.terms} - {term.name for term in half.terms} == {"weight cast buffer"}
