"""What a file takes on a card: to the byte what the real ComfyUI said, for every format, option and generation of card."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import headers
import pytest
from host.checkpoints import header_of
from host.record.folding import Tensors, unfolded
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram.estimate.checkpoint import Checkpoint, TensorInfo
from vram_headroom.vram.estimate.footprint import (
    Footprint,
    LoadRules,
    clip_vision,
    diffusion_model,
    is_quantised,
    text_encoder,
    vae,
)

MIB, GIB = 1 << 20, 1 << 30
RECORDED = headers.recorded("footprints")
NEWEST = next(iter(RECORDED))
VARIANTS = headers.recorded("variants")
ADA, AMPERE = LoadRules.of_card((8, 9), 24 * GIB, GIB), LoadRules.of_card((8, 6), 24 * GIB, GIB)
LARGE_AMPERE = LoadRules.of_card((8, 6), 48 * GIB, GIB)
FFN = 13824 * 5120


def file_of(version: str, name: str) -> Checkpoint:
    """One of the recorded files; a version holds those that differ from the newest's."""
    return headers.recorded_checkpoint(RECORDED[version]["files"].get(name) or RECORDED[NEWEST]["files"][name])


def rules_of(version: str, reading: Mapping[str, Any]) -> LoadRules:
    major, minor = reading["card"].partition(",")[0].split(".")
    return LoadRules.of_card(
        (int(major), int(minor)),
        reading.get("total", 24 * GIB),
        RECORDED[version]["minimum_inference"],
        comfyui=tuple(int(part) for part in version.split(".")),  # pyright: ignore[reportArgumentType]
    )


def readings(kind: str) -> list[Any]:
    return [
        pytest.param(version, reading, id=f"{version} {reading['file']} {reading['card']} {reading.get('weight_dtype', '')}")
        for version, record in RECORDED.items()
        for reading in record[kind]
    ]


@pytest.mark.parametrize(("version", "reading"), readings("diffusion_models"))
def test_a_diffusion_model_weighs_what_comfyui_says(version: str, reading: dict[str, Any]) -> None:
    read, rules = file_of(version, reading["file"]), rules_of(version, reading)
    found = diffusion_model(read, weight_dtype=reading["weight_dtype"], rules=rules)
    if "refused" in reading:
        assert any("this ComfyUI cannot load" in sentence for sentence in found.assumptions)
        return
    # ComfyUI drops scales of inputs that are 1; the header does not tell
    dropped = 26 * 4 if reading["file"] == "scaled fp8, input scale of 1" else 0
    assert found.booked == reading["bytes"] + dropped
    assert found.resident == found.booked
    assert bool(found.assumptions) is ("input scale" in reading["file"])
    plain = reading["file"].startswith("plain fp8") and reading["weight_dtype"] == "default"
    assert found.kept_fp8 == (reading["dtype"].startswith("float8") if plain else None)
    assert (found.step is not None) is plain
    cast = "none" if reading["cast_to"] is None else found.cast
    assert found.cast == cast


@pytest.mark.parametrize(("version", "reading"), [case for case in readings("diffusion_models") if "placed" in case.values[1]])
def test_part_of_a_model_is_placed_as_comfyui_places_it(version: str, reading: dict[str, Any]) -> None:
    found = diffusion_model(file_of(version, reading["file"]), rules=rules_of(version, reading))
    for placed in reading["placed"]:
        assert found.placed(placed["budget"], placed["streams"]) == (placed["on_card"], placed["buffer"])


@pytest.mark.parametrize(("version", "reading"), readings("text_encoders"))
def test_a_text_encoder_weighs_what_comfyui_says(version: str, reading: dict[str, Any]) -> None:
    assert text_encoder(headers.recorded_checkpoint(reading)).booked == reading["bytes"]


@pytest.mark.parametrize(("version", "reading"), readings("vae"))
def test_a_vae_weighs_what_comfyui_says(version: str, reading: dict[str, Any]) -> None:
    assert vae(headers.recorded_checkpoint(reading), rules=rules_of(version, reading)).booked == reading["bytes"]


@pytest.mark.parametrize(("version", "reading"), readings("clip_vision"))
def test_the_image_encoder_weighs_what_comfyui_says(version: str, reading: dict[str, Any]) -> None:
    recorded = headers.recorded_checkpoint(VARIANTS["CLIP vision H"])
    assert clip_vision(recorded, rules=rules_of(version, reading)).booked == reading["bytes"] == 1_266_785_280
    official = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header_of("clip_vision_h").items()}
    assert clip_vision(headers.checkpoint(official)).booked == reading["bytes"]


# full size


def official(name: str) -> Checkpoint:
    return headers.checkpoint({key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header_of(name).items()})


def stored(name: str, matrices: str, rest: str = "F16") -> Checkpoint:
    """A recorded variant with its matrices in one type and the rest in another."""
    tensors = unfolded(VARIANTS[name])
    return headers.checkpoint({key: (matrices if len(shape) == 2 else rest, shape) for key, (_, shape) in tensors.items()})


@pytest.mark.parametrize(
    ("rules", "kept", "gib", "says"),
    [
        (ADA, True, 13.3, "because this card multiplies it"),
        (AMPERE, True, 13.3, "because 26.6 GB in 16 bit would not fit this card"),
        (LARGE_AMPERE, False, 26.6, "twice the size, because 26.6 GB fit this card"),
    ],
)
def test_plain_fp8_of_14b_is_kept_or_doubles_and_the_step_is_named(rules: LoadRules, kept: bool, gib: float, says: str) -> None:
    found = diffusion_model(stored("2.1 T2V 14B", "F8_E4M3"), rules=rules)
    assert found.kept_fp8 is kept
    assert found.resident / GIB == pytest.approx(gib, abs=0.05)
    assert found.step is not None
    assert found.step.endswith(says)


def test_the_step_of_plain_fp8_lies_where_comfyui_puts_it() -> None:
    read = stored("2.1 T2V 14B", "F8_E4M3")
    edge = (2 * 14_288_491_584 + GIB) / 0.88
    below, above = (diffusion_model(read, rules=replace(AMPERE, card_total=round(edge * share))) for share in (0.9999, 1.0001))
    assert (below.kept_fp8, above.kept_fp8) == (True, False)
    assert above.resident - below.resident == sum(
        tensor.elements for tensor in read.tensors.values() if "patch_embedding" not in tensor.name
    )


def test_weight_dtype_has_the_last_word_over_a_plain_file_and_none_over_a_quantised_one() -> None:
    plain, scaled = stored("2.1 T2V 14B", "F16"), official("wan2.1_t2v_14B_fp8_scaled")
    assert diffusion_model(plain, weight_dtype="fp8_e4m3fn", rules=ADA).resident / GIB == pytest.approx(13.31, abs=0.01)
    asked, found = (diffusion_model(scaled, weight_dtype=option, rules=ADA) for option in ("fp8_e5m2", "default"))
    assert 0 < found.resident - asked.resident < 4 * MIB
    assert asked.kept_fp8 is None


def test_a_weight_dtype_of_another_pack_is_taken_for_the_default_and_said() -> None:
    read = stored("2.1 T2V 1.3B", "F16")
    found = diffusion_model(read, weight_dtype="bf16_fast", rules=ADA)
    assert found.resident == diffusion_model(read, rules=ADA).resident
    assert found.assumptions == ("the weight_dtype 'bf16_fast' is not ComfyUI's; it is taken for the default",)


@pytest.mark.parametrize(
    ("read", "option", "rules", "cast", "transient"),
    [
        (stored("2.1 T2V 14B", "F16"), "default", ADA, "none", 0),
        (stored("2.1 T2V 14B", "F16"), "fp8_e4m3fn", ADA, "cast", 2 * FFN),
        (stored("2.1 T2V 14B", "F16"), "fp8_e4m3fn_fast", ADA, "native", 0),
        (stored("2.1 T2V 14B", "F16"), "fp8_e4m3fn_fast", AMPERE, "cast", 2 * FFN),
        (stored("2.1 T2V 14B", "F8_E4M3"), "default", AMPERE, "cast", 2 * FFN),
        (stored("2.1 T2V 14B", "F8_E4M3"), "default", LARGE_AMPERE, "none", 0),
        (official("wan2.1_t2v_14B_fp8_scaled"), "default", ADA, "native", 0),
        (official("wan2.1_t2v_14B_fp8_scaled"), "default", AMPERE, "dequantise", 2 * FFN),
        (stored("2.1 T2V 1.3B", "F16"), "default", LoadRules.of_card((6, 1), 8 * GIB, GIB), "cast", 4 * 8960 * 1536),
    ],
)
def test_a_weight_is_copied_to_run_where_the_card_cannot_use_it_as_it_lies(
    read: Checkpoint, option: str, rules: LoadRules, cast: str, transient: int
) -> None:
    found = diffusion_model(read, weight_dtype=option, rules=rules)
    assert found.cast == cast
    assert sum(term.bytes for term in found.transients) == transient


def test_loras_cost_nothing_once_merged_and_four_bytes_per_weight_on_the_way() -> None:
    read = stored("2.1 T2V 14B", "F16")
    plain, patched = (diffusion_model(read, rules=ADA, patched=patched) for patched in (False, True))
    assert patched.resident == plain.resident
    assert patched.transients == plain.transients == ()
    assert [term.bytes for term in patched.patching] == [10 * FFN]
    assert 10 * FFN == 675 * MIB
    assert sum(term.bytes for term in patched.streaming) - sum(term.bytes for term in plain.streaming) == 4 * FFN
    assert [term.bytes for term in diffusion_model(official("wan2.1_t2v_14B_fp8_scaled"), patched=True).patching] == [15 * FFN]


def test_streams_copy_the_largest_layers_ahead() -> None:
    read = stored("2.1 T2V 14B", "F16")
    found = diffusion_model(read, rules=ADA)
    largest, second = 2 * (30720 * 5120 + 30720), 2 * (FFN + 13824)
    assert found.largest_layer == largest == 314_634_240
    assert [term.bytes for term in found.streaming] == [largest + second]
    assert [term.bytes for term in diffusion_model(read, rules=replace(ADA, streams=0)).streaming] == [largest]


def test_dynamic_patchers_stage_the_file_and_hold_the_same() -> None:
    read = stored("2.1 T2V 1.3B", "F32", "F32")
    found = diffusion_model(read, rules=ADA)
    assert found.staged_bytes == read.tensor_bytes + 4000
    assert found.resident / found.staged_bytes == pytest.approx(0.5, abs=0.001)


# GGUF

BITS = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q4_0": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625, "IQ4_XS": 4.25}
DEQUANTISED = {"Q8_0": 2.0, "Q4_0": 3.0, "Q6_K": 5.13, "Q4_K": 5.19, "Q2_K": 5.25, "Q3_K": 5.31, "Q5_K": 7.19, "IQ4_XS": 10.0}


def packed(tensors: Tensors, kind: str) -> Checkpoint:
    """`tensors` as GGUF files hold them: matrices packed, the rest in F32, the patch in F16."""
    infos: dict[str, TensorInfo] = {}
    for name, (_, shape) in tensors.items():
        dtype = kind if len(shape) == 2 and "rel_b" not in name else "F16" if len(shape) == 5 else "F32"
        elements = TensorInfo(name, dtype, shape, 0).elements
        nbytes = round(elements * BITS[kind] / 8) if dtype == kind else elements * (2 if dtype == "F16" else 4)
        infos[name] = TensorInfo(name, dtype, shape, nbytes)
    return replace(headers.checkpoint({}), tensors=infos)


@pytest.mark.parametrize("kind", sorted(BITS))
def test_gguf_stays_packed_and_unpacks_one_layer_at_a_time(kind: str) -> None:
    tensors = unfolded(VARIANTS["2.2 I2V A14B"])
    read = packed(tensors, kind)
    found = diffusion_model(read, rules=ADA)
    narrowed = [info for name, info in read.tensors.items() if info.dtype == "F32" and ("norm" in name or "modulation" in name)]
    patch = 2 * 5120 * 36 * 4
    assert found.resident == read.tensor_bytes + 4000 - sum(info.nbytes // 2 for info in narrowed) + patch
    assert found.booked == found.resident + 2 * 30720 * 5120
    assert [term.bytes for term in found.transients] == [round(DEQUANTISED[kind] * FFN)]
    assert bool(found.assumptions) is (kind == "IQ4_XS")


def test_a_lora_on_gguf_is_added_in_every_forward_in_fp32() -> None:
    read = packed(unfolded(VARIANTS["2.2 I2V A14B"]), "Q8_0")
    found = diffusion_model(read, rules=ADA, patched=True)
    assert [term.bytes for term in found.transients] == [12 * FFN]
    assert found.patching == ()


def test_the_vocabulary_of_a_packed_text_encoder_is_unpacked() -> None:
    names = {
        "shared": "token_embd",
        "encoder.final_layer_norm": "enc.output_norm",
        "encoder.block": "enc.blk",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.0.SelfAttention.": "attn_",
        "layer.1.DenseReluDense.": "ffn_",
    }
    tensors: Tensors = {}
    for key, tensor in unfolded(VARIANTS["UMT5-XXL"]).items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        tensors[key] = tensor
    read = packed(tensors, "Q8_0")
    vocabulary = read.tensors["token_embd.weight"]
    found = text_encoder(read)
    assert found.resident == read.tensor_bytes - vocabulary.nbytes + 2 * vocabulary.elements + 4
    assert found.resident / GIB == pytest.approx(6.54, abs=0.02)


# what cannot be


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"weight_bytes": 3}, "weight_bytes"),
        ({"compute_bytes": 0}, "compute_bytes"),
        ({"vae_bytes": -2}, "vae_bytes"),
        ({"card_total": -1}, "card_total"),
        ({"minimum_inference": -1}, "minimum_inference"),
        ({"streams": -1}, "streams"),
    ],
)
def test_rules_that_cannot_be_are_refused_by_name(wrong: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        LoadRules(**wrong)  # pyright: ignore[reportArgumentType]


def test_a_negative_budget_is_refused_by_name() -> None:
    found = diffusion_model(stored("2.1 T2V 1.3B", "F16"))
    with pytest.raises(ValueError, match="budget"):
        found.placed(-1, 2)
    with pytest.raises(ValueError, match="streams"):
        found.placed(1, -2)


def test_scales_without_a_mark_make_no_quantised_file() -> None:
    tensors = unfolded(VARIANTS["2.1 T2V 1.3B"])
    tensors["blocks.0.ffn.0.weight"] = ("F8_E4M3", (8960, 1536))
    tensors["blocks.0.ffn.0.weight_scale"] = ("F32", ())
    assert not is_quantised(headers.checkpoint(tensors))
    tensors["blocks.0.ffn.0.comfy_quant"] = ("U8", (27,))
    assert is_quantised(headers.checkpoint(tensors))


DTYPES = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "I64", "BOOL", "F4", "Q4_K", "Q8_0", "")
LAYERS = ("blocks.0.ffn.0", "blocks.0.modulation", "patch_embedding", "enc.blk.0.ffn_up", "shared", "head", "a", "")
PARTS = (
    *("weight", "bias", "comfy_quant", "scale_weight", "scale_input", "weight_scale", "weight_scale_2", "weight_s_rel", ""),
    *("modulation", "kernel", "position_ids"),
)
NAMES = (
    st.builds(lambda layer, part: f"{layer}.{part}", st.sampled_from(LAYERS), st.sampled_from(PARTS))
    | st.sampled_from(["scaled_fp8", "spiece_model", "encoder.final_layer_norm.weight", "head.modulation", "head.head.weight"])
    | st.text(max_size=8)
)
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 1 << 16), max_size=5).map(tuple), st.integers(0, 1 << 40)),
    max_size=16,
)
LAYERS_JSON = st.dictionaries(st.sampled_from(LAYERS), st.none() | st.fixed_dictionaries({"format": st.text(max_size=4)}))
BROKEN_JSON = st.sampled_from(["", "{", "3", '{"layers": 4}', "[" * 99_999])
METADATA = BROKEN_JSON | LAYERS_JSON.map(lambda found: json.dumps({"layers": found}))


def checks_out(found: Footprint) -> None:
    assert found.resident >= 0
    assert found.booked >= found.resident
    assert found.staged_bytes >= 0
    assert 0 <= found.largest_layer <= found.resident
    assert sum(module.bytes for module in found.modules) <= found.resident
    assert all(term.bytes > 0 for term in (*found.transients, *found.streaming, *found.patching))


@given(
    tensors=TENSORS,
    quantisation=st.none() | METADATA,
    option=st.sampled_from(["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]) | st.text(max_size=5),
    capability=st.tuples(st.integers(0, 20), st.integers(0, 9)),
    total=st.integers(0, 1 << 40),
    patched=st.booleans(),
    budget=st.integers(0, 1 << 40),
)
def test_no_header_makes_a_footprint_raise(
    tensors: dict[str, tuple[str, tuple[int, ...], int]],
    quantisation: str | None,
    option: str,
    capability: tuple[int, int],
    total: int,
    patched: bool,
    budget: int,
) -> None:
    infos = {name: TensorInfo(name, dtype, shape, nbytes) for name, (dtype, shape, nbytes) in tensors.items()}
    metadata = {} if quantisation is None else {"_quantization_metadata": quantisation}
    read = Checkpoint("/m/x", 0, infos, metadata)
    rules = LoadRules.of_card(capability, total, GIB)
    found = diffusion_model(read, weight_dtype=option, rules=rules, patched=patched)
    checks_out(found)
    on_card, _ = found.placed(budget, 2)
    assert on_card <= min(budget, found.resident)
    for other in (text_encoder(read, rules=rules), vae(read, rules=rules), clip_vision(read, rules=rules)):
        checks_out(other)
