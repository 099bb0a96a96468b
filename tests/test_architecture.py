"""Which model a file holds: every WAN by the keys of the real classes, and what is no WAN."""

from math import prod
from typing import Any

import headers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from host.checkpoints import CATALOGUE, header_of
from host.record.folding import Tensors, folded, unfolded
from hypothesis import given
from hypothesis import strategies as st
from vram_headroom.vram.estimate.architecture import (
    PREFIXES,
    UNKNOWN,
    Architecture,
    identify,
    identify_dit,
    is_lora,
    noise_hint,
)

RECORDED = headers.recorded("variants")
DITS = tuple(name for name, record in RECORDED.items() if "detected" in record)
NEWEST, OLDEST = "0.33.0", "0.8.0"

# Section 1 of the reference's table: counted on ComfyUI's and the authors' own modules.
PARAMETERS = {
    "2.1 T2V 1.3B": 1_418_996_800,
    "causal 1.3B": 1_418_996_800,
    "2.1 T2V 14B": 14_288_491_584,
    "2.1 I2V 14B": 16_394_878_784,
    "2.1 FLF2V 14B": 16_395_536_704,
    "2.2 I2V A14B": 14_288_901_184,
    "2.2 TI2V 5B": 4_999_787_712,
    "VACE 1.3B": 2_153_972_032,
    "VACE 14B": 17_337_592_896,
    "Fun-Control 14B": 16_395_124_544,
    "Fun-Control 1.3B": 1_564_502_336,
    "Fun-InP 1.3B": 1_564_428_608,
    "2.2 Fun-Control A14B": 14_289_561_664,
    "Fun-Camera 14B": 16_898_128_704,
    "Fun-Camera 1.3B": 1_616_313_152,
    "2.2 Fun-Camera A14B": 14_792_233_024,
    "2.2 S2V 14B": 16_295_755_609,
    "2.2 Animate 14B": 17_274_816_884,
    "HuMo 17B": 17_055_925_312,
    "UMT5-XXL": 5_680_910_336,
    "CLIP vision H": 632_076_800,
    "VAE 2.1": 126_892_531,
    "VAE 2.2": 704_688_668,
}

# Published file sizes that are known to the byte, the bytes of one weight, and whether patch_embedding is kept in fp32.
PUBLISHED = {
    "wan2.1_t2v_1.3B_fp16": ("2.1 T2V 1.3B", 2_838_303_560, 2, True),
    "wan2.1_i2v_480p_14B_fp16": ("2.1 I2V 14B", 32_791_377_504, 2, True),
    "wan2.2_i2v_high_noise_14B_fp8_scaled": ("2.2 I2V A14B", 14_294_742_832, 1, False),
    "wan2.2_ti2v_5B_fp16": ("2.2 TI2V 5B", 9_999_658_848, 2, False),
    "wan2.1_vace_14B_fp16": ("VACE 14B", 34_675_323_640, 2, False),
    "wan2.2_animate_14B_bf16": ("2.2 Animate 14B", 34_549_787_368, 2, False),
    "clip_vision_h": ("CLIP vision H", 1_264_219_396, 2, False),
    "wan_2.1_vae": ("VAE 2.1", 253_815_318, 2, False),
    "wan2.2_vae": ("VAE 2.2", 1_409_400_960, 2, False),
}

# variant, name, image tokens, VACE blocks, reference frame
TOLD = {
    "2.1 T2V 1.3B": ("t2v", "WAN T2V 1.3B", 0, 0, False),
    "2.1 T2V 14B": ("t2v", "WAN T2V 14B", 0, 0, False),
    "2.1 I2V 14B": ("i2v", "WAN 2.1 I2V 14B", 257, 0, False),
    "2.1 FLF2V 14B": ("flf2v", "WAN 2.1 FLF2V 14B", 514, 0, False),
    "2.2 I2V A14B": ("i2v_2.2", "WAN 2.2 I2V 14B", 0, 0, False),
    "2.2 TI2V 5B": ("ti2v", "WAN 2.2 TI2V 5B", 0, 0, False),
    "VACE 1.3B": ("vace", "WAN VACE 1.3B", 0, 15, False),
    "VACE 14B": ("vace", "WAN VACE 14B", 0, 8, False),
    "Fun-Control 14B": ("fun_control", "WAN 2.1 Fun-Control 14B", 257, 0, False),
    "Fun-Control 1.3B": ("fun_control", "WAN 2.1 Fun-Control 1.3B", 257, 0, False),
    "Fun-InP 1.3B": ("fun_inp", "WAN 2.1 Fun-InP 1.3B", 257, 0, False),
    "2.2 Fun-Control A14B": ("fun_control_2.2", "WAN 2.2 Fun-Control 14B", 0, 0, True),
    "Fun-Camera 14B": ("camera", "WAN 2.1 Fun-Camera 14B", 257, 0, False),
    "Fun-Camera 1.3B": ("camera", "WAN 2.1 Fun-Camera 1.3B", 257, 0, False),
    "2.2 Fun-Camera A14B": ("camera_2.2", "WAN 2.2 Fun-Camera 14B", 0, 0, False),
    "2.2 S2V 14B": ("s2v", "WAN 2.2 S2V 14B", 0, 0, False),
    "2.2 Animate 14B": ("animate", "WAN 2.2 Animate 14B", 257, 0, False),
    "HuMo 17B": ("humo", "WAN HuMo 17B", 0, 0, False),
    "Animate 2 14B": ("animate2", "WAN Animate 2 14B", 257, 0, False),
    "SCAIL 14B": ("scail", "WAN SCAIL 14B", 257, 0, False),
    "SCAIL-2 14B": ("scail2", "WAN SCAIL-2 14B", 257, 0, False),
    "WanDancer 14B": ("wandancer", "WAN WanDancer 14B", 257, 0, False),
    "causal 1.3B": ("causal", "WAN causal T2V 1.3B", 0, 0, False),
}

# What ComfyUI calls the ones that it does not call as we do.
COMFYUI_CALLS = {
    **dict.fromkeys(("i2v_2.2", "ti2v", "fun_control_2.2", "causal"), "t2v"),
    **dict.fromkeys(("flf2v", "fun_control", "fun_inp"), "i2v"),
}


def found(name: str) -> Architecture:
    return identify(headers.recorded_checkpoint(RECORDED[name]))


def test_every_recorded_model_has_its_law() -> None:
    assert set(TOLD) == set(DITS)
    assert set(RECORDED) - set(PARAMETERS) == {"Animate 2 14B", "SCAIL 14B", "SCAIL-2 14B", "WanDancer 14B", "T5-XXL"}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_of_every_variant_are_counted_exactly(name: str) -> None:
    assert found(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("file", sorted(PUBLISHED))
def test_published_files_hold_the_parameters_and_a_header(file: str) -> None:
    name, size, weight_bytes, wide_patch = PUBLISHED[file]
    tensors = unfolded(RECORDED[name])
    narrow = size - found(name).parameters * weight_bytes
    wide = sum(prod(shape) for _, shape in tensors.values() if weight_bytes == 1 and len(shape) != 2)
    patch = sum(prod(tensors[key][1]) * 2 for key in tensors if key.startswith("patch_embedding."))
    rest = narrow - wide - (patch if wide_patch else 0)
    assert 0 < rest < 0.001 * size, f"{rest:,} bytes for the header"


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_official_files_are_counted_as_the_classes_are(name: str) -> None:
    entries = header_of(name).items()
    official = identify(headers.checkpoint({key: (entry["dtype"], tuple(entry["shape"])) for key, entry in entries}))
    assert official.kind != "unknown"
    if official.kind != "lora":
        assert official.parameters in PARAMETERS.values()


@pytest.mark.parametrize("name", DITS)
def test_every_variant_is_told_by_its_keys(name: str) -> None:
    told = found(name)
    variant, called, image_tokens, vace_layers, reference = TOLD[name]
    assert (told.kind, told.variant, told.name) == ("dit", variant, called)
    assert (told.image_tokens, told.vace_layers, told.reference_conv) == (image_tokens, vace_layers, reference)
    assert told.causal is (name == "causal 1.3B")
    assert told.spatial_stride == (16 if name == "2.2 TI2V 5B" else 8)


@pytest.mark.parametrize("name", DITS)
def test_sizes_and_usage_factor_are_those_of_comfyuis_own_detection(name: str) -> None:
    told, theirs = found(name), RECORDED[name]["detected"][NEWEST]
    assert COMFYUI_CALLS.get(str(told.variant), told.variant) == theirs["model_type"]
    for ours, key in (
        (told.dim, "dim"),
        (told.ffn_dim, "ffn_dim"),
        (told.heads, "num_heads"),
        (told.layers, "num_layers"),
        (told.in_channels, "in_dim"),
        (told.out_channels, "out_dim"),
    ):
        assert ours == theirs[key], key
    assert told.usage_factor == pytest.approx(theirs["usage_factor"], rel=1e-12)
    assert told.vace_layers == theirs.get("vace_layers", 0)
    assert told.reference_conv is ("in_dim_ref_conv" in theirs)
    assert told.image_tokens == theirs.get("flf_pos_embed_token_number", told.image_tokens)
    assert told.causal is theirs.get("causal_ar", False)


def test_the_oldest_comfyui_differs_on_five_variants_only() -> None:
    """What 0.8 takes for another model, or for none."""
    different = {
        name: (record["detected"][OLDEST]["model"], record["detected"][NEWEST]["model"])
        for name in DITS
        if (record := RECORDED[name])["detected"][OLDEST] != record["detected"][NEWEST]
    }
    assert different == {
        "Animate 2 14B": ("WAN21_I2V", "WAN_Animate2"),
        "SCAIL 14B": (None, "WAN21_SCAIL"),
        "SCAIL-2 14B": (None, "WAN21_SCAIL2"),
        "WanDancer 14B": ("WAN21_I2V", "WAN22_WanDancer"),
        "causal 1.3B": ("WAN21_T2V", "WAN21_CausalAR_T2V"),
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["2.2 TI2V 5B", "VACE 14B", "2.1 FLF2V 14B"])
def test_a_prefix_changes_nothing_but_itself(name: str, prefix: str) -> None:
    tensors = {prefix + key: tensor for key, tensor in unfolded(RECORDED[name]).items()}
    tensors["first_stage_model.decoder.conv1.weight"] = ("F16", (384, 16, 3, 3, 3))
    bare, prefixed = found(name), identify(headers.checkpoint(tensors))
    assert prefixed.prefix == prefix
    assert (prefixed.name, prefixed.layers, prefixed.ffn_dim) == (bare.name, bare.layers, bare.ffn_dim)
    if prefix:
        assert prefixed.parameters == bare.parameters


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32"])
def test_the_type_of_the_weights_does_not_change_the_model(dtype: str) -> None:
    tensors: Tensors = {key: (dtype, shape) for key, (_, shape) in unfolded(RECORDED["2.1 I2V 14B"]).items()}
    assert identify(headers.checkpoint(tensors)) == found("2.1 I2V 14B")


def test_packed_weights_count_as_what_they_stand_for() -> None:
    plain = unfolded(RECORDED["2.2 I2V A14B"])
    for scales, weight in (
        ({"weight_scale": ("U8", 16), "weight_scale_2": ("F32", 0)}, "U8"),
        ({"weight_s_rel": ("F8_E4M3", 16), "weight_s_channel": ("F32", 0)}, "I8"),
        ({"weight_scale": ("F32", 64)}, "I8"),
    ):
        tensors = dict(plain)
        for key, (_, shape) in plain.items():
            if len(shape) != 2 or not key.startswith("blocks."):
                continue
            layer = key.removesuffix("weight")
            tensors[key] = (weight, (shape[0], shape[1] // 2))
            for scale, (dtype, group) in scales.items():
                tensors[layer + scale] = (dtype, (shape[0], shape[1] // group) if group else ())
            tensors[layer + "comfy_quant"] = ("U8", (19,))
        assert identify(headers.checkpoint(tensors)).parameters == PARAMETERS["2.2 I2V A14B"]


def test_eight_bit_weights_with_a_scale_per_row_are_not_packed() -> None:
    tensors: Tensors = {**unfolded(RECORDED["2.1 T2V 1.3B"])}
    tensors["blocks.0.ffn.0.weight"] = ("I8", (8960, 1536))
    tensors["blocks.0.ffn.0.weight_scale"] = ("F32", (8960, 1))
    assert identify(headers.checkpoint(tensors)).parameters == PARAMETERS["2.1 T2V 1.3B"]


# other layouts


def on_meta(made: torch.nn.Module) -> Architecture:
    state = made.state_dict()
    return identify(headers.of_shapes((name, tuple(tensor.shape)) for name, tensor in state.items()))


SMALL: dict[str, Any] = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
LARGE: dict[str, Any] = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
IMAGE: dict[str, Any] = {"image_dim": 1280, "added_kv_proj_dim": 5120}


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        ({**SMALL}, "2.1 T2V 1.3B"),
        ({**LARGE}, "2.1 T2V 14B"),
        ({**LARGE, **IMAGE, "in_channels": 36}, "2.1 I2V 14B"),
        ({**LARGE, **IMAGE, "in_channels": 36, "pos_embed_seq_len": 514}, "2.1 FLF2V 14B"),
        ({**LARGE, "in_channels": 36}, "2.2 I2V A14B"),
        (
            {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
            "2.2 TI2V 5B",
        ),
    ],
)
def test_the_layout_of_diffusers_is_the_same_model(config: dict[str, Any], recorded: str) -> None:
    with torch.device("meta"):
        told = on_meta(WanTransformer3DModel(**config))
    theirs = found(recorded)
    assert told.layout == "diffusers"
    for field in ("name", "variant", "dim", "ffn_dim", "layers", "heads", "in_channels", "out_channels", "image_tokens"):
        assert getattr(told, field) == getattr(theirs, field), field
    assert told.parameters == theirs.parameters


def test_vace_and_animate_are_told_in_the_layout_of_diffusers() -> None:
    with torch.device("meta"):
        vace = on_meta(WanVACETransformer3DModel(**LARGE, vace_layers=[0, 5, 10, 15, 20, 25, 30, 35], vace_in_channels=96))
        animate = on_meta(WanAnimateTransformer3DModel(**LARGE, **IMAGE, in_channels=36))
    assert (vace.variant, vace.vace_layers, vace.parameters) == ("vace", 8, PARAMETERS["VACE 14B"])
    assert (animate.variant, animate.image_tokens, animate.layers) == ("animate", 257, 40)


def test_both_vaes_are_told_in_the_layout_of_diffusers() -> None:
    second: dict[str, Any] = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
    patched: dict[str, Any] = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    with torch.device("meta"):
        one = on_meta(AutoencoderKLWan())
        two = on_meta(AutoencoderKLWan(**second, **patched))
    assert (one.name, one.layout, one.out_channels, one.spatial_stride) == ("WAN 2.1 VAE", "diffusers", 16, 8)
    assert (two.name, two.layout, two.out_channels, two.spatial_stride) == ("WAN 2.2 VAE", "diffusers", 48, 16)
    assert (one.parameters, two.parameters) == (PARAMETERS["VAE 2.1"], PARAMETERS["VAE 2.2"])


def test_the_vae_of_qwen_image_cannot_be_told_from_that_of_wan_2_1() -> None:
    with torch.device("meta"):
        assert on_meta(AutoencoderKLQwenImage()) == on_meta(AutoencoderKLWan())


@pytest.mark.parametrize(
    ("name", "called", "dim", "channels", "stride"),
    [("VAE 2.1", "WAN 2.1 VAE", 96, 16, 8), ("VAE 2.2", "WAN 2.2 VAE", 160, 48, 16)],
)
def test_the_two_vaes_are_told_apart(name: str, called: str, dim: int, channels: int, stride: int) -> None:
    told = found(name)
    assert (told.kind, told.name, told.dim, told.out_channels, told.spatial_stride) == ("vae", called, dim, channels, stride)


def test_a_vae_with_four_colours_is_that_of_qwen_image_layered() -> None:
    tensors = unfolded(RECORDED["VAE 2.1"])
    tensors["encoder.conv1.weight"] = ("F16", (96, 4, 3, 3, 3))
    assert identify(headers.checkpoint(tensors)).name == "Qwen-Image-Layered VAE"


LLAMA_CPP = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "encoder.block": "enc.blk",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    **{f"layer.0.SelfAttention.{part}": f"attn_{part}" for part in "qkvo"},
    "layer.0.layer_norm": "attn_norm",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}
AUTHORS = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "encoder.block": "blocks",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    **{f"layer.0.SelfAttention.{part}": f"attn.{part}" for part in "qkvo"},
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


@pytest.mark.parametrize(("layout", "names"), [("comfyui", {}), ("llama.cpp", LLAMA_CPP), ("wan", AUTHORS)])
def test_umt5_is_told_in_every_layout(layout: str, names: dict[str, str]) -> None:
    tensors: Tensors = {}
    for key, tensor in unfolded(RECORDED["UMT5-XXL"]).items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        tensors[key] = tensor
    told = identify(headers.checkpoint(tensors))
    assert (told.kind, told.name, told.layout, told.dim, told.layers) == ("text_encoder", "UMT5-XXL", layout, 4096, 24)
    assert (told.ffn_dim, told.heads, told.parameters) == (10240, 64, PARAMETERS["UMT5-XXL"])


def test_t5_is_not_umt5() -> None:
    assert found("T5-XXL").name == "T5-XXL"


def test_clip_vision_is_told_with_its_size() -> None:
    told = found("CLIP vision H")
    assert (told.kind, told.name, told.layers, told.dim) == ("clip_vision", "CLIP vision H", 32, 1280)
    large = [(f"vision_model.encoder.layers.{number}.layer_norm1.weight", (1024,)) for number in range(24)]
    assert identify(headers.of_shapes(large)).name == "CLIP vision"


PATCHES = (
    *(
        ".lora_down.weight",
        ".lora_up.weight",
        ".lora_A.weight",
        ".lora_B.default.weight",
        ".lora.down.weight",
        ".diff",
        ".diff_b",
    ),
    *(".diff_m", ".lokr_w1", ".lokr_w2_b", ".hada_w1_a", ".oft_blocks", ".dora_scale", ".lora_linear_layer.up.weight"),
)


@pytest.mark.parametrize("suffix", PATCHES)
def test_every_kind_of_patch_is_a_lora(suffix: str) -> None:
    key = "diffusion_model.blocks.0.self_attn.q" + suffix
    assert is_lora({key})
    assert identify(headers.of_shapes([(key, (64, 5120))])).kind == "lora"


def test_a_model_is_no_lora() -> None:
    for record in RECORDED.values():
        assert not is_lora(unfolded(record))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX"),
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "FLUX"),
        ("model.diffusion_model.label_emb.0.0.weight", "SDXL"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
        ("first_stage_model.decoder.mid.block_1.norm1.weight", "an image VAE"),
        ("model.layers.0.self_attn.k_proj.weight", "a language model"),
    ],
)
def test_what_is_not_wan_is_called_by_its_family(key: str, name: str) -> None:
    told = identify(headers.of_shapes([(key, (8, 8))]))
    assert (told.kind, told.name, told.usage_factor) == ("unknown", name, None)


def test_what_nobody_knows_is_unknown() -> None:
    assert identify(headers.of_shapes([])) is UNKNOWN
    assert identify(headers.of_shapes([("layer.weight", (4, 4))])) is UNKNOWN


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf", "low"),
        ("sub/low_noise/wan.safetensors", None),
        ("wan2.1_t2v_14B_fp16.safetensors", None),
        ("high_to_low.safetensors", None),
        ("slow_highway.safetensors", None),
    ],
)
def test_a_name_hints_at_the_noise_and_nothing_more(name: str, noise: str | None) -> None:
    assert noise_hint(name) == noise


def test_experts_of_wan_2_2_are_the_same_to_us() -> None:
    high, low = (header_of(f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled").items() for noise in ("high", "low"))
    high, low = (
        identify(headers.checkpoint({key: (entry["dtype"], tuple(entry["shape"])) for key, entry in noise}))
        for noise in (high, low)
    )
    assert high == low


# nothing raises

KEYS = sorted({key for name in ("2.1 FLF2V 14B", "VACE 1.3B", "UMT5-XXL", "VAE 2.2") for key in unfolded(RECORDED[name])})
SHAPES = st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple)
MARKS = (
    *("head.modulation", "head.head.weight", "patch_embedding.weight", "scale_shift_table", "proj_out.weight"),
    *("condition_embedder.time_proj.weight", "img_emb.emb_pos", "blocks.0.ffn.0.weight", "vace_blocks.", "blocks."),
    *("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight", "token_embedding.weight"),
)


@given(
    shapes=st.dictionaries(st.sampled_from([*KEYS, *MARKS]) | st.text(max_size=20), SHAPES, max_size=12),
    always=SHAPES,
    dtype=st.sampled_from(["F16", "F8_E4M3", "U8", "I8"]),
    config=st.sampled_from(["", "{", "[]", "null", '{"transformer": 3}', '{"transformer": {"num_heads": "x"}}', "[" * 99_999])
    | st.text(max_size=10),
)
def test_no_header_makes_identification_raise(
    shapes: dict[str, tuple[int, ...]], always: tuple[int, ...], dtype: str, config: str
) -> None:
    tensors: Tensors = {key: (dtype, shape) for key, shape in shapes.items()}
    for marked in (tensors, {**dict.fromkeys(MARKS, (dtype, always)), **tensors}):
        read = headers.checkpoint(marked, {"config": config})
        told = identify(read)
        assert told.parameters >= 0
        assert identify_dit(read) is None or told.kind == "dit"


def test_a_folded_header_unfolds_to_itself() -> None:
    for record in RECORDED.values():
        tensors = unfolded(record)
        assert unfolded(folded(tensors)) == tensors
