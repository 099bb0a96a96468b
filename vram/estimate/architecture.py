"""Which model a checkpoint holds, by its keys and shapes: every WAN model, its VAEs and encoders, LoRAs, and what is no WAN.

The order of the questions is that of ComfyUI's comfy/model_detection.py (0.33; 0.8 asks the first part of them): the first key
that is there names the variant. tests/data/variants.json holds the keys of the real classes and ComfyUI's own answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from .checkpoint import Checkpoint, TensorInfo

ModelKind = Literal["dit", "vae", "text_encoder", "clip_vision", "lora", "unknown"]

Variant = Literal[
    "t2v",
    "i2v",
    "flf2v",
    "i2v_2.2",
    "ti2v",
    "vace",
    "fun_control",
    "fun_inp",
    "fun_control_2.2",
    "camera",
    "camera_2.2",
    "s2v",
    "humo",
    "animate",
    "animate2",
    "scail",
    "scail2",
    "wandancer",
    "causal",
    "flow_rvs",
]
"""`t2v` is text to video of either generation; `i2v`, `flf2v`, `fun_control`, `fun_inp` and `camera` are of 2.1, `ti2v` is 5B.
Fun-InP 14B has the keys of I2V 14B and is called so, as are 2.2 Fun-InP and 2.2 I2V, and Fun-VACE and VACE."""

Layout = Literal["comfyui", "diffusers", "wan", "llama.cpp"]
"""Whose names the tensors have. ComfyUI itself loads `comfyui`; `llama.cpp` is what GGUF text encoders use; `wan` is the text
encoder of the authors' own code."""

Noise = Literal["high", "low"]

PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.", "model.", "")
"""What may stand before a diffusion model's keys: whole checkpoints, some exports, bare files."""

USAGE_FACTOR_DIM: Final = 2222
"""memory_usage_factor = dim / 2222 (ComfyUI comfy/supported_models.py, WAN21_T2V.__init__, 0.8 and 0.33)."""

VACE_FACTOR: Final = 1.2
"""VACE runs extra blocks: factor x 1.2 (ComfyUI comfy/supported_models.py, WAN21_Vace.__init__, 0.8 and 0.33)."""

WANDANCER_USAGE_FACTOR: Final = 1.8
"""Whatever the dim (ComfyUI comfy/supported_models.py, WAN22_WanDancer.__init__, 0.33; 0.8 does not know the model)."""

HEAD_DIM: Final = 128
"""Width of an attention head in every WAN (ComfyUI comfy/model_detection.py: num_heads = dim // 128)."""

PATCH_CELLS: Final = 4
"""Latent cells of a token, 1 x 2 x 2: the head makes four times the latent's channels (comfy/model_detection.py)."""

IMAGE_TOKENS: Final = 257
"""Tokens of one image from CLIP ViT-H: 16 x 16 patches and the class (comfy/clip_vision_config_h.json: 224 px, patch 14)."""

AREA_CONDS: Final[Mapping[str, tuple[str, ...]]] = {
    "s2v": ("reference_latent", "reference_motion"),
    "scail": ("reference_latent", "pose_latents"),
    "scail2": ("reference_latent", "pose_latents", "ref_mask_latents", "sam_latents"),
}
"""Conditions whose shapes ComfyUI adds to the latent's in memory_required (comfy/model_base.py memory_usage_factor_conds, 0.33;
0.8 has the first). Of a motion, pose or sam latent it counts 1.5 frames whatever its length (memory_usage_shape_process)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a checkpoint's keys say it is. A number is None, and a flag False, where the kind has no such thing."""

    kind: ModelKind
    name: str
    dim: int | None = None
    layers: int | None = None
    in_channels: int | None = None
    """Channels of the latent with what is concatenated to it; of a VAE, channels of the picture."""
    out_channels: int | None = None
    """Channels of the latent."""
    usage_factor: float | None = None
    """ComfyUI's memory_usage_factor."""
    spatial_stride: int | None = None
    """Pixels of one latent cell: 8 for the 2.1 VAE, 16 for the 2.2 one."""
    variant: Variant | None = None
    ffn_dim: int | None = None
    heads: int | None = None
    vace_layers: int = 0
    image_embedding: bool = False
    """It attends to a CLIP image beside the text: `image_tokens` more."""
    first_last: bool = False
    """It takes the images of a first and a last frame."""
    reference_conv: bool = False
    """A reference latent becomes one more frame of tokens."""
    causal: bool = False
    """It makes the video block by block and keeps keys and values of what it made."""
    area_conds: tuple[str, ...] = ()
    layout: Layout = "comfyui"
    prefix: str = ""
    """What stands before the keys in this file."""
    parameters: int = 0
    """Weights of the model itself: scales, markers, tokenizers and fixed buffers are not among them."""

    @property
    def image_tokens(self) -> int:
        """Tokens of the image embedding that cross-attention sees beside the text."""
        return (2 if self.first_last else 1) * IMAGE_TOKENS if self.image_embedding else 0


UNKNOWN: Final = Architecture("unknown", "unknown")


def identify(checkpoint: Checkpoint) -> Architecture:
    """Name the model in `checkpoint` by its keys and shapes.

    What is no part of WAN has the kind `unknown`: with the family's name where a key tells it, else UNKNOWN. Raises nothing.
    """
    if (dit := identify_dit(checkpoint)) is not None:
        return dit
    tensors = checkpoint.tensors
    found = _vae(tensors) or _text_encoder(tensors) or _clip_vision(tensors)
    if found is not None:
        return found
    if is_lora(tensors.keys()):
        return Architecture("lora", "LoRA", parameters=parameter_count(tensors))
    return _other(tensors)


def identify_dit(checkpoint: Checkpoint) -> Architecture | None:
    """The WAN diffusion model in `checkpoint`, or None.

    High and low noise experts have equal keys, and so have a causal 1.3B and the plain one: the first are not told apart here,
    the second only by the file's metadata.
    """
    tensors = checkpoint.tensors
    for prefix in PREFIXES:
        for names in (_COMFYUI, _DIFFUSERS):
            found = _dit(tensors, prefix, names, _transformer_config(checkpoint.metadata))
            if found is not None:
                return found
    return None


def noise_hint(file_name: str) -> Noise | None:
    """Which expert of WAN 2.2 a file's name says it is. A hint for people to read: names lie, so no number may rest on it."""
    words = re.split(r"[^a-z]+", file_name.lower().rpartition("/")[2].rpartition("\\")[2])
    high, low = ({noise, noise + "noise"} & set(words) for noise in ("high", "low"))
    if bool(high) == bool(low):
        return None
    return "high" if high else "low"


LORA_KEY: Final = re.compile(
    r".*\.(?:(?:lora|lora_linear_layer)[._](?:down|up|A|B)(?:\.default)?\.weight|diff(?:_b|_m)?|set_weight|[wb]_norm|dora_scale"
    r"|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|oft_blocks|oft_diag)"
)
"""What the keys of a patch end with (ComfyUI comfy/lora.py load_lora and comfy/weight_adapter, 0.33)."""


def is_lora(keys: Collection[str]) -> bool:
    """Patches for another model's weights: low-rank, Kronecker, Hadamard, orthogonal, or plain differences."""
    return any(LORA_KEY.fullmatch(key) for key in keys)


NOT_PARAMETER: Final = re.compile(
    r".*(?:scale_weight|scale_input|scaled_fp8|weight_scale|weight_scale_2|input_scale|pre_quant_scale|weight_s_rel"
    r"|weight_s_channel|weight_codebook|comfy_quant|spiece_model|tekken_model|tokenizer_json|position_ids|alpha|\.kernel)"
)
"""What tensors that are no weights are called: scales and marks of quantisation, tokenizers, fixed buffers (`.kernel`: the blur
in the motion encoder of 2.2 Animate)."""

PACKED_IN_BYTES: Final = frozenset({"U8", "I8"})
"""Types that hold two 4-bit weights in a byte, in layers with scales of blocks (nvfp4, W4A4, W4A8)."""


def parameter_count(tensors: Mapping[str, TensorInfo]) -> int:
    """Weights in `tensors`, two for each byte of a layer whose scales say that it is packed."""
    return sum(logical_elements(tensor, tensors) for tensor in tensors.values() if not NOT_PARAMETER.fullmatch(tensor.name))


def logical_elements(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> int:
    """Weights that `tensor` of the file `tensors` stands for: twice its elements where two share a byte."""
    if tensor.dtype not in PACKED_IN_BYTES or not tensor.name.endswith(".weight"):
        return tensor.elements
    layer = tensor.name.removesuffix(".weight")
    if f"{layer}.weight_scale_2" in tensors or f"{layer}.weight_s_rel" in tensors:
        return 2 * tensor.elements
    scale = tensors.get(f"{layer}.weight_scale")
    # one scale for each 64 weights of a row is W4A4; INT8 has one for the layer or for each row
    if scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1 and tensor.dtype == "I8":
        return 2 * tensor.elements
    return tensor.elements


class _Names(NamedTuple):
    """What one layout calls the parts that tell a WAN diffusion model."""

    layout: Layout
    marks: tuple[str, ...]
    """Keys that a WAN has and others have not: all of them must be there."""
    modulation: str
    head: str
    ffn: str
    image: str
    positions: str
    kinds: tuple[tuple[str, Variant], ...]
    """The first key that is there names the variant."""


_COMFYUI = _Names(
    layout="comfyui",
    marks=("head.modulation", "head.head.weight", "patch_embedding.weight"),
    modulation="head.modulation",
    head="head.head.weight",
    ffn="blocks.0.ffn.0.weight",
    image="img_emb.proj.0.bias",
    positions="img_emb.emb_pos",
    kinds=(
        ("vace_patch_embedding.weight", "vace"),
        ("control_adapter.conv.weight", "camera"),
        ("casual_audio_encoder.encoder.final_linear.weight", "s2v"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "humo"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "animate"),
        ("patch_embedding_mask.weight", "scail2"),
        ("patch_embedding_pose.weight", "scail"),
        ("patch_embedding_global.weight", "wandancer"),
    ),
)
_DIFFUSERS = _Names(
    layout="diffusers",
    marks=("condition_embedder.time_proj.weight", "scale_shift_table", "proj_out.weight", "patch_embedding.weight"),
    modulation="scale_shift_table",
    head="proj_out.weight",
    ffn="blocks.0.ffn.net.0.proj.weight",
    image="condition_embedder.image_embedder.norm1.bias",
    positions="condition_embedder.image_embedder.pos_embed",
    kinds=(("vace_patch_embedding.weight", "vace"), ("pose_patch_embedding.weight", "animate")),
)
"""diffusers 0.42: transformer_wan.py, transformer_wan_vace.py, transformer_wan_animate.py."""


def _dit(tensors: Mapping[str, TensorInfo], prefix: str, names: _Names, config: Mapping[str, Any]) -> Architecture | None:
    if not all(prefix + mark in tensors for mark in names.marks):
        return None
    modulation, head = tensors[prefix + names.modulation], tensors[prefix + names.head]
    patch = tensors[prefix + "patch_embedding.weight"]
    if not modulation.shape or not head.shape or len(patch.shape) < 2:
        return None
    dim, out_channels = modulation.shape[-1], head.shape[0] // PATCH_CELLS
    # a file format of at most four dimensions holds the patch as one row
    in_channels = patch.shape[1] if len(patch.shape) > 2 else patch.shape[1] // PATCH_CELLS
    image = prefix + names.image in tensors
    reference = prefix + "ref_conv.weight" in tensors
    told: Variant | None = next((kind for key, kind in names.kinds if prefix + key in tensors), None)
    variant = _variant(told, config, in_channels, out_channels, image, prefix + names.positions in tensors, dim, reference)
    ffn = tensors.get(prefix + names.ffn)
    heads = config.get("num_heads")
    return Architecture(
        kind="dit",
        name=_dit_name(variant, dim, in_channels, out_channels),
        dim=dim,
        layers=_count(tensors, prefix + "blocks."),
        in_channels=in_channels,
        out_channels=out_channels,
        usage_factor=_usage_factor(variant, dim),
        spatial_stride=16 if out_channels == 48 else 8,
        variant=variant,
        ffn_dim=ffn.shape[0] if ffn is not None and ffn.shape else None,
        heads=heads if isinstance(heads, int) and heads > 0 else dim // HEAD_DIM,
        vace_layers=_count(tensors, prefix + "vace_blocks."),
        image_embedding=image,
        first_last=prefix + names.positions in tensors,
        reference_conv=reference,
        causal=variant == "causal",
        area_conds=AREA_CONDS.get(variant, ()),
        layout=names.layout,
        prefix=prefix,
        parameters=parameter_count({name: info for name, info in tensors.items() if name.startswith(prefix)}),
    )


def _variant(
    told: Variant | None,
    config: Mapping[str, Any],
    in_channels: int,
    out_channels: int,
    image: bool,
    positions: bool,
    dim: int,
    reference: bool,
) -> Variant:
    """`told` by a key of its own, or what channels and image embedding say, or the file's metadata, which has the last word."""
    if config.get("model_type") == "animate2":
        return "animate2"
    if config.get("model_type") == "flow_rvs":
        return "flow_rvs"
    if told is not None:
        return "camera_2.2" if told == "camera" and not image else told
    if out_channels == 48:
        return "ti2v"
    if config.get("causal_ar") is True and not image:
        return "causal"
    if image:
        if in_channels == 48:
            return "fun_control"
        if positions:
            return "flf2v"
        return "fun_inp" if dim == 1536 else "i2v"  # there is no I2V of 1.3B but Fun's
    if reference or in_channels > 36:
        return "fun_control_2.2"
    return "i2v_2.2" if in_channels == 36 else "t2v"


_CALLED: Final[Mapping[Variant, str]] = {
    "t2v": "T2V",
    "i2v": "2.1 I2V",
    "flf2v": "2.1 FLF2V",
    "i2v_2.2": "2.2 I2V",
    "ti2v": "2.2 TI2V",
    "vace": "VACE",
    "fun_control": "2.1 Fun-Control",
    "fun_inp": "2.1 Fun-InP",
    "fun_control_2.2": "2.2 Fun-Control",
    "camera": "2.1 Fun-Camera",
    "camera_2.2": "2.2 Fun-Camera",
    "s2v": "2.2 S2V",
    "humo": "HuMo",
    "animate": "2.2 Animate",
    "animate2": "Animate 2",
    "scail": "SCAIL",
    "scail2": "SCAIL-2",
    "wandancer": "WanDancer",
    "causal": "causal T2V",
    "flow_rvs": "FlowRVS",
}


def _dit_name(variant: Variant, dim: int, in_channels: int, out_channels: int) -> str:
    size = {1536: "1.3B", 3072: "5B", 5120: "14B"}.get(dim, f"dim {dim}")
    if variant == "humo":
        size = {1536: "1.7B", 5120: "17B"}.get(dim, size)
    called = "2.2 Fun" if variant == "ti2v" and in_channels > out_channels else _CALLED[variant]
    return f"WAN {called} {size}"


def _usage_factor(variant: Variant, dim: int) -> float:
    if variant == "wandancer":
        return WANDANCER_USAGE_FACTOR
    return dim / USAGE_FACTOR_DIM * (VACE_FACTOR if variant == "vace" else 1.0)


def _transformer_config(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What the file's metadata says of its transformer; ComfyUI (0.33) lets it overrule what the keys say."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        return {}
    transformer = config.get("transformer") if isinstance(config, dict) else None
    return transformer if isinstance(transformer, dict) else {}


def _count(tensors: Iterable[str], before: str) -> int:
    """How many numbers follow `before` in the keys."""
    return len({key[len(before) :].partition(".")[0] for key in tensors if key.startswith(before)})


# the other parts of a pipeline


def _vae(tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    """A VAE with WAN's keys. Qwen-Image's is the 2.1 one with other weights: nothing in keys or shapes tells them apart."""
    layout: Layout
    if "decoder.middle.0.residual.0.gamma" in tensors:
        layout, first, last, middle = "comfyui", "encoder.conv1.weight", "decoder.head.2.weight", "conv2.weight"
        second = "decoder.upsamples.0.upsamples.0.residual.2.weight" in tensors
    elif "decoder.mid_block.resnets.0.norm1.gamma" in tensors:
        layout, first, last = "diffusers", "encoder.conv_in.weight", "decoder.conv_out.weight"
        middle = "post_quant_conv.weight"
        second = _first_size(tensors, middle) == 48
    else:
        return None
    pictures = _shape(tensors, first)
    channels = pictures[1] if len(pictures) > 1 else 12 if second else 3
    name = "WAN 2.2 VAE" if second else "WAN 2.1 VAE"
    if not second and channels == 4:
        name = "Qwen-Image-Layered VAE"
    elif not second and _first_size(tensors, last) == 12:
        name = "WAN 2.1 VAE, decoding at twice the size"
    return Architecture(
        kind="vae",
        name=name,
        dim=_first_size(tensors, first),
        in_channels=channels,
        out_channels=_first_size(tensors, middle) or (48 if second else 16),
        spatial_stride=16 if second else 8,
        layout=layout,
        parameters=parameter_count(tensors),
    )


_UMT5_MARKS: Final[tuple[tuple[Layout, str, str, str], ...]] = (
    ("comfyui", "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight", "shared.weight", "relative_attention_bias"),
    ("llama.cpp", "enc.blk.{}.ffn_up.weight", "token_embd.weight", "attn_rel_b"),
    ("wan", "blocks.{}.ffn.fc1.weight", "token_embedding.weight", "pos_embedding.embedding"),
)
"""Layout, a wide layer of block N, the vocabulary, and what a block's own position bias is called: UMT5 has one in every block,
T5 in the first only."""

UMT5_LAYERS: Final = 24
"""Blocks of UMT5-XXL's encoder (ComfyUI comfy/text_encoders/umt5_config_xxl.json)."""


def _text_encoder(tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    for layout, wide, vocabulary, bias in _UMT5_MARKS:
        last = wide.format(UMT5_LAYERS - 1)
        biases = sum(1 for name in tensors if bias in name)
        if last in tensors and (layout != "wan" or vocabulary in tensors):
            shape = _shape(tensors, vocabulary)
            return Architecture(
                kind="text_encoder",
                name="T5-XXL" if biases == 1 else "UMT5-XXL",
                dim=shape[1] if len(shape) == 2 else 4096,
                layers=UMT5_LAYERS,
                ffn_dim=_first_size(tensors, last),
                heads=64,
                layout=layout,
                parameters=parameter_count(tensors),
            )
        if biases and layout == "comfyui":
            return Architecture("text_encoder", "T5 family", parameters=parameter_count(tensors))
    return None


def _clip_vision(tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    for layout, layer in (
        ("comfyui", "vision_model.encoder.layers.{}.layer_norm1.weight"),
        ("wan", "visual.transformer.{}.norm1.weight"),
        ("wan", "visual.transformer.resblocks.{}.ln_1.weight"),
    ):
        if layer.format(0) not in tensors:
            continue
        layers = sum(1 for number in range(64) if layer.format(number) in tensors)
        dim = _first_size(tensors, layer.format(0))
        return Architecture(
            kind="clip_vision",
            name="CLIP vision H" if (layers, dim) == (32, 1280) else "CLIP vision",
            dim=dim,
            layers=layers,
            layout="wan" if layout == "wan" else "comfyui",
            parameters=parameter_count(tensors),
        )
    return None


_OTHERS: Final = (
    ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX"),
    ("double_blocks.0.img_attn.norm.key_norm.weight", "FLUX"),
    ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
    ("adaln_single.emb.timestep_embedder.linear_1.bias", "LTX-Video"),
    ("blocks.0.mlp.layer1.weight", "Cosmos-Predict2"),
    ("caption_projection.0.linear.weight", "HiDream"),
    ("cap_embedder.1.weight", "Lumina"),
    ("t5_yproj.weight", "Mochi"),
    ("joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("add_embedding.linear_1.weight", "SDXL"),
    ("label_emb.0.0.weight", "SDXL"),
    ("input_blocks.0.0.weight", "Stable Diffusion"),
    ("decoder.mid.block_1.norm1.weight", "an image VAE"),
    ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
    ("model.layers.0.self_attn.k_proj.weight", "a language model"),
)
"""A key of what is no WAN, and what it is (ComfyUI comfy/model_detection.py and comfy/sd.py detect_te_model, 0.33)."""


def _other(tensors: Mapping[str, TensorInfo]) -> Architecture:
    for key, name in _OTHERS:
        if any(prefix + key in tensors for prefix in (*PREFIXES, "first_stage_model.", "vae.")):
            return Architecture("unknown", name, parameters=parameter_count(tensors))
    return UNKNOWN


def _shape(tensors: Mapping[str, TensorInfo], name: str) -> tuple[int, ...]:
    return tensors[name].shape if name in tensors else ()


def _first_size(tensors: Mapping[str, TensorInfo], name: str) -> int | None:
    return next(iter(_shape(tensors, name)), None)
