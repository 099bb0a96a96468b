"""Stand-ins for the official WAN files: name, keys, shapes, types and size as published, and a hole where the weights lie.

Written from the architectures. What was published confirms them: a header written here as safetensors writes it (compact
JSON, wide types first, then by name, spaces up to a multiple of 8) gives the published file size to the byte for thirteen
of the sixteen files whose exact size is known. That settles what an architecture leaves open:

- fp8_scaled transformers: every Linear in fp8, also outside the blocks, each with a 0-dimensional F32 `scale_weight` and
  `scale_input`, and an empty `scaled_fp8`; everything else F16. (The encoder has no `scale_input`.)
- fp16 transformers of 2.1 keep `patch_embedding` in F32; the 5B of 2.2 does not.
- lightx2v LoRAs: rank 64 in F32 over the ten Linears of each block, `lora_down`, `lora_up` and an I64 scalar `alpha`.

Two published headers are longer, by 27,424 (T2V 1.3B) and 9,264 bytes (VAE 2.1), and CLIP's ends two bytes later and is not
a multiple of 8: what the first two hold more is not known. The stand-ins are filled up with spaces, as the format allows.
Of the files with no exact size published, the 2.1 fp8_scaled are taken to be as the 2.2, and the 2.2 14B fp16 as the 5B.
"""

import json
import struct
from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple, TypedDict

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Tensors = dict[str, tuple[str, Shape]]


class Entry(TypedDict):
    """A tensor in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class OfficialFile(NamedTuple):
    """Where a file belongs, what it holds, and its exact size where that was published."""

    folder: str
    tensors: Callable[[], Tensors]
    file_bytes: int | None = None


# the files


def write_official_models(models_dir: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Write `<models_dir>/<folder>/<name>.safetensors` for the names given, or for all. Takes some KB of disk per file."""
    wanted = {name: CATALOGUE[name] for name in (CATALOGUE if names is None else names)}
    return {name: _write(models_dir / file.folder / f"{name}.safetensors", name) for name, file in wanted.items()}


def header_of(name: str) -> dict[str, Entry]:
    """The header of an official file."""
    header: dict[str, Entry] = {}
    end = 0
    tensors = CATALOGUE[name].tensors()
    for key in sorted(tensors, key=lambda key: (_ORDER.index(tensors[key][0]), key)):
        dtype, shape = tensors[key]
        begin, end = end, end + _BYTES[dtype] * prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header


_BYTES = {"I64": 8, "F32": 4, "F16": 2, "F8_E4M3": 1, "U8": 1}
_ORDER = list(_BYTES)  # safetensors writes the widest types first


def _write(path: Path, name: str) -> Path:
    header = header_of(name)
    text = json.dumps(header, separators=(",", ":")).encode()
    data_bytes = max(entry["data_offsets"][1] for entry in header.values())
    known = CATALOGUE[name].file_bytes
    length = len(text) + -len(text) % 8 if known is None else known - data_bytes - 8
    assert length >= len(text), f"{name}: the header is {len(text) - length} bytes longer than the published one"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + text.ljust(length))
        file.truncate(8 + length + data_bytes)
    return path


# how they are stored


def _fp16(shapes: Shapes, wide: tuple[str, ...] = ()) -> Tensors:
    """All in F16, but what starts with one of `wide` in F32."""
    return {key: ("F32" if key.startswith(wide) else "F16", shape) for key, shape in shapes.items()}


def _fp8_scaled(shapes: Shapes, scales: tuple[str, ...], embeddings: tuple[str, ...] = ()) -> Tensors:
    """Linear weights (the matrices that are no embeddings) in fp8 with scalar scales beside them, the rest in F16."""
    tensors: Tensors = {"scaled_fp8": ("F8_E4M3", (0,))}
    for key, shape in shapes.items():
        linear = len(shape) == 2 and not key.endswith(embeddings)
        tensors[key] = ("F8_E4M3" if linear else "F16", shape)
        if linear:
            tensors.update({key.removesuffix("weight") + scale: ("F32", ()) for scale in scales})
    return tensors


def _layer(name: str, *weight: int) -> Shapes:
    """A Linear or a convolution (weight: outputs, inputs, kernel), or a norm (weight: width): with a bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


# the models


def dit(dim: int, ffn: int, layers: int, inputs: int = 16, outputs: int = 16, sees_image: bool = False) -> Shapes:
    """The diffusion transformer. `sees_image`: the image-to-video of 2.1, which attends to CLIP vision's 1280 features."""
    shapes: Shapes = {
        **_layer("patch_embedding", dim, inputs, 1, 2, 2),
        **_layer("text_embedding.0", dim, 4096),
        **_layer("text_embedding.2", dim, dim),
        **_layer("time_embedding.0", dim, 256),
        **_layer("time_embedding.2", dim, dim),
        **_layer("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **_layer("head.head", 4 * outputs, dim),  # patches of 1×2×2
    }
    if sees_image:
        shapes |= _layer("img_emb.proj.0", 1280) | _layer("img_emb.proj.1", 1280, 1280)
        shapes |= _layer("img_emb.proj.3", dim, 1280) | _layer("img_emb.proj.4", dim)
    for block in (f"blocks.{i}" for i in range(layers)):
        shapes |= {f"{block}.modulation": (1, 6, dim), **_layer(f"{block}.norm3", dim)}
        for linear, size in _block_linears(dim, ffn).items():
            shapes |= _layer(f"{block}.{linear}", *size)
        for norm in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"):
            shapes[f"{block}.{norm}.weight"] = (dim,)
        if sees_image:
            shapes |= _layer(f"{block}.cross_attn.k_img", dim, dim) | _layer(f"{block}.cross_attn.v_img", dim, dim)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
    return shapes


def _block_linears(dim: int, ffn: int) -> Shapes:
    attention = {f"{kind}_attn.{part}": (dim, dim) for kind in ("self", "cross") for part in "qkvo"}
    return {**attention, "ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}


def lora(dim: int, ffn: int, layers: int, rank: int) -> Tensors:
    """A LoRA over the Linears of the blocks of a `dit`."""
    tensors: Tensors = {}
    for block in (f"diffusion_model.blocks.{i}" for i in range(layers)):
        for linear, (outputs, inputs) in _block_linears(dim, ffn).items():
            tensors[f"{block}.{linear}.lora_down.weight"] = ("F32", (rank, inputs))
            tensors[f"{block}.{linear}.lora_up.weight"] = ("F32", (outputs, rank))
            tensors[f"{block}.{linear}.alpha"] = ("I64", ())
    return tensors


def umt5() -> Shapes:
    """The encoder of UMT5-XXL: a relative position bias in every layer."""
    dim, ffn = 4096, 10240
    shapes: Shapes = {"shared.weight": (256384, dim), "encoder.final_layer_norm.weight": (dim,)}
    for block in (f"encoder.block.{i}.layer" for i in range(24)):
        shapes |= {f"{block}.0.SelfAttention.{part}.weight": (dim, dim) for part in "qkvo"}
        shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        shapes |= {f"{block}.1.DenseReluDense.{part}.weight": (ffn, dim) for part in ("wi_0", "wi_1")}
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (dim, ffn)
        shapes |= {f"{block}.{part}.layer_norm.weight": (dim,) for part in (0, 1)}
    return shapes


def _with_vocabulary(tensors: Tensors) -> Tensors:
    """The official encoders carry their SentencePiece model as a tensor of bytes."""
    return {**tensors, "spiece_model": ("U8", (4_548_313,))}


def clip_vision_h() -> Tensors:
    """The image tower of CLIP ViT-H/14 with its projection, under the key names of `CLIPVisionModelWithProjection`."""
    dim, ffn, model = 1280, 5120, "vision_model"
    shapes: Shapes = {
        f"{model}.embeddings.class_embedding": (dim,),
        f"{model}.embeddings.patch_embedding.weight": (dim, 3, 14, 14),
        f"{model}.embeddings.position_embedding.weight": (257, dim),
        **_layer(f"{model}.pre_layrnorm", dim),
        **_layer(f"{model}.post_layernorm", dim),
        "visual_projection.weight": (1024, dim),
    }
    for block in (f"{model}.encoder.layers.{i}" for i in range(32)):
        shapes |= _layer(f"{block}.layer_norm1", dim) | _layer(f"{block}.layer_norm2", dim)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _layer(f"{block}.self_attn.{part}", dim, dim)
        shapes |= _layer(f"{block}.mlp.fc1", ffn, dim) | _layer(f"{block}.mlp.fc2", dim, ffn)
    return {**_fp16(shapes), f"{model}.embeddings.position_ids": ("I64", (1, 257))}


def vae_2_1() -> Shapes:
    """The VAE of 2.1: stages in one flat list, upsampling halves the channels."""
    shapes = _vae_ends(latent=16, image=3, encoder=(96, 384), decoder=(384, 96))
    part, number, channels = "encoder.downsamples", 0, 96
    for stage, width in enumerate((96, 192, 384, 384)):
        for _ in range(2):
            shapes |= _residual(f"{part}.{number}", channels, width)
            number, channels = number + 1, width
        if stage < 3:
            shapes |= _layer(f"{part}.{number}.resample.1", width, width, 3, 3)
            if stage > 0:
                shapes |= _layer(f"{part}.{number}.time_conv", width, width, 3, 1, 1)
            number += 1
    part, number, channels = "decoder.upsamples", 0, 384
    for stage, width in enumerate((384, 384, 192, 96)):
        for _ in range(3):
            shapes |= _residual(f"{part}.{number}", channels, width)
            number, channels = number + 1, width
        if stage < 3:
            shapes |= _layer(f"{part}.{number}.resample.1", width // 2, width, 3, 3)
            if stage < 2:
                shapes |= _layer(f"{part}.{number}.time_conv", 2 * width, width, 3, 1, 1)
            number, channels = number + 1, width // 2
    return shapes


def vae_2_2() -> Shapes:
    """The VAE of 2.2: a list per stage, images as patches of 2×2 pixels, upsampling keeps the channels."""
    shapes = _vae_ends(latent=48, image=12, encoder=(160, 640), decoder=(1024, 256))
    channels = 160
    for stage, width in enumerate((160, 320, 640, 640)):
        part = f"encoder.downsamples.{stage}.downsamples"
        shapes |= _residual(f"{part}.0", channels, width) | _residual(f"{part}.1", width, width)
        if stage < 3:
            shapes |= _layer(f"{part}.2.resample.1", width, width, 3, 3)
        if stage in (1, 2):
            shapes |= _layer(f"{part}.2.time_conv", width, width, 3, 1, 1)
        channels = width
    channels = 1024
    for stage, width in enumerate((1024, 1024, 512, 256)):
        part = f"decoder.upsamples.{stage}.upsamples"
        for i in range(3):
            shapes |= _residual(f"{part}.{i}", width if i else channels, width)
        if stage < 3:
            shapes |= _layer(f"{part}.3.resample.1", width, width, 3, 3)
        if stage < 2:
            shapes |= _layer(f"{part}.3.time_conv", 2 * width, width, 3, 1, 1)
        channels = width
    return shapes


def _vae_ends(latent: int, image: int, encoder: tuple[int, int], decoder: tuple[int, int]) -> Shapes:
    """What both VAEs have around their stages; `encoder` and `decoder` are the channels they begin and end with."""
    shapes: Shapes = {
        **_layer("conv1", 2 * latent, 2 * latent, 1, 1, 1),
        **_layer("conv2", latent, latent, 1, 1, 1),
    }
    for part, (first, last), middle, source, target in (
        ("encoder", encoder, encoder[1], image, 2 * latent),
        ("decoder", decoder, decoder[0], latent, image),
    ):
        shapes |= _layer(f"{part}.conv1", first, source, 3, 3, 3)
        shapes |= _residual(f"{part}.middle.0", middle, middle) | _residual(f"{part}.middle.2", middle, middle)
        shapes[f"{part}.middle.1.norm.gamma"] = (middle, 1, 1)
        shapes |= _layer(f"{part}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
        shapes |= _layer(f"{part}.middle.1.proj", middle, middle, 1, 1)
        shapes[f"{part}.head.0.gamma"] = (last, 1, 1, 1)
        shapes |= _layer(f"{part}.head.2", target, last, 3, 3, 3)
    return shapes


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.residual.0.gamma": (inputs, 1, 1, 1),
        **_layer(f"{name}.residual.2", outputs, inputs, 3, 3, 3),
        f"{name}.residual.3.gamma": (outputs, 1, 1, 1),
        **_layer(f"{name}.residual.6", outputs, outputs, 3, 3, 3),
    }
    return shapes if inputs == outputs else {**shapes, **_layer(f"{name}.shortcut", outputs, inputs, 1, 1, 1)}


# the catalogue

_14B = partial(dit, 5120, 13824, 40)
_WIDE_PATCHES = ("patch_embedding.",)
_BOTH_SCALES = ("scale_weight", "scale_input")
_EMBEDDINGS = ("shared.weight", "relative_attention_bias.weight")


def _dit_file(store: Callable[[Shapes], Tensors], shapes: Callable[[], Shapes], size: int | None = None) -> OfficialFile:
    return OfficialFile("diffusion_models", lambda: store(shapes()), size)


_WIDE_FP16 = partial(_fp16, wide=_WIDE_PATCHES)
_FP8 = partial(_fp8_scaled, scales=_BOTH_SCALES)
_I2V_2_1 = partial(_14B, inputs=36, sees_image=True)
_I2V_2_2 = partial(_14B, inputs=36)
_LORA = OfficialFile("loras", lambda: lora(5120, 13824, 40, rank=64), 1_226_977_424)

CATALOGUE: dict[str, OfficialFile] = {
    "wan2.1_t2v_1.3B_fp16": _dit_file(_WIDE_FP16, lambda: dit(1536, 8960, 30), 2_838_303_560),
    "wan2.1_t2v_14B_fp16": _dit_file(_WIDE_FP16, _14B),
    "wan2.1_t2v_14B_fp8_scaled": _dit_file(_FP8, _14B),
    "wan2.1_i2v_480p_14B_fp16": _dit_file(_WIDE_FP16, _I2V_2_1, 32_791_377_504),
    "wan2.1_i2v_480p_14B_fp8_scaled": _dit_file(_FP8, _I2V_2_1),
    "wan2.2_ti2v_5B_fp16": _dit_file(_fp16, lambda: dit(3072, 14336, 30, 48, 48), 9_999_658_848),
    "umt5_xxl_fp16": OfficialFile("text_encoders", lambda: _with_vocabulary(_fp16(umt5())), 11_366_399_385),
    "umt5_xxl_fp8_e4m3fn_scaled": OfficialFile(
        "text_encoders", lambda: _with_vocabulary(_fp8_scaled(umt5(), ("scale_weight",), _EMBEDDINGS)), 6_735_906_897
    ),
    "wan_2.1_vae": OfficialFile("vae", lambda: _fp16(vae_2_1()), 253_815_318),
    "wan2.2_vae": OfficialFile("vae", lambda: _fp16(vae_2_2()), 1_409_400_960),
    "clip_vision_h": OfficialFile("clip_vision", clip_vision_h, 1_264_219_396),
}
for _noise in ("high", "low"):
    CATALOGUE |= {
        f"wan2.2_t2v_{_noise}_noise_14B_fp16": _dit_file(_fp16, _14B),
        f"wan2.2_t2v_{_noise}_noise_14B_fp8_scaled": _dit_file(_FP8, _14B, 14_293_923_632),
        f"wan2.2_i2v_{_noise}_noise_14B_fp16": _dit_file(_fp16, _I2V_2_2),
        f"wan2.2_i2v_{_noise}_noise_14B_fp8_scaled": _dit_file(_FP8, _I2V_2_2, 14_294_742_832),
        f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{_noise}_noise": _LORA,
        f"wan2.2_i2v_lightx2v_4steps_lora_v1_{_noise}_noise": _LORA,
    }
