"""Small graphs, files and cards for planner tests: sizes are multiples of one UNIT, so that every decision is exact."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vram_headroom.vram.estimate.architecture import Architecture
from vram_headroom.vram.estimate.checkpoint import Checkpoint, TensorInfo
from vram_headroom.vram.plan.types import Card, HostRules, MissingFileError, ModelRef, NodeSpec

UNIT = 1 << 20

RULES = HostRules(reserve_bytes=0, minimum_inference_bytes=0, headroom_bytes=0)
"""A host that keeps nothing for itself: what does not fit in these tests does not fit by its own size."""

BITS = {"F16": 16, "BF16": 16, "F32": 32, "F8_E4M3": 8, "U8": 8}

VOCABULARY: Mapping[str, NodeSpec] = {
    "UNETLoader": NodeSpec({"unet_name": "COMBO", "weight_dtype": "COMBO"}, ("MODEL",)),
    "CLIPLoader": NodeSpec({"clip_name": "COMBO", "type": "COMBO", "device": "COMBO"}, ("CLIP",), False, {"device": "default"}),
    "VAELoader": NodeSpec({"vae_name": "COMBO"}, ("VAE",)),
    "CLIPVisionLoader": NodeSpec({"clip_name": "COMBO"}, ("CLIP_VISION",)),
    "CheckpointLoaderSimple": NodeSpec({"ckpt_name": "COMBO"}, ("MODEL", "CLIP", "VAE")),
    "MagicModelMaker": NodeSpec({"seed": "INT"}, ("MODEL",)),
    "LoraLoaderModelOnly": NodeSpec({"model": "MODEL", "lora_name": "COMBO", "strength_model": "FLOAT"}, ("MODEL",)),
    "ModelSamplingSD3": NodeSpec({"model": "MODEL", "shift": "FLOAT"}, ("MODEL",)),
    "ModelMergeSimple": NodeSpec({"model1": "MODEL", "model2": "MODEL", "ratio": "FLOAT"}, ("MODEL",)),
    "CLIPTextEncode": NodeSpec({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "CLIPVisionEncode": NodeSpec({"clip_vision": "CLIP_VISION", "image": "IMAGE"}, ("CLIP_VISION_OUTPUT",)),
    "LoadImage": NodeSpec({"image": "COMBO"}, ("IMAGE", "MASK")),
    "EmptyHunyuanLatentVideo": NodeSpec(
        {"width": "INT", "height": "INT", "length": "INT", "batch_size": "INT"}, ("LATENT",), False, {"batch_size": 1}
    ),
    "WanImageToVideo": NodeSpec(
        {
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "vae": "VAE",
            "width": "INT",
            "height": "INT",
            "length": "INT",
            "batch_size": "INT",
            "start_image": "IMAGE",
        },
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "KSampler": NodeSpec(
        {
            "model": "MODEL",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
        },
        ("LATENT",),
    ),
    "KSamplerAdvanced": NodeSpec(
        {
            "model": "MODEL",
            "steps": "INT",
            "cfg": "FLOAT",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "start_at_step": "INT",
            "end_at_step": "INT",
        },
        ("LATENT",),
    ),
    "BasicScheduler": NodeSpec({"model": "MODEL", "steps": "INT"}, ("SIGMAS",)),
    "CFGGuider": NodeSpec(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": "FLOAT"}, ("GUIDER",)
    ),
    "BasicGuider": NodeSpec({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",)),
    "SamplerCustomAdvanced": NodeSpec({"guider": "GUIDER", "sigmas": "SIGMAS", "latent_image": "LATENT"}, ("LATENT", "LATENT")),
    "VAEDecode": NodeSpec({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveVideo": NodeSpec({"images": "IMAGE"}, (), True),
    "PrimitiveInt": NodeSpec({"value": "INT"}, ("INT",)),
    "PrimitiveFloat": NodeSpec({"value": "FLOAT"}, ("FLOAT",)),
    "PrimitiveBoolean": NodeSpec({"value": "BOOLEAN"}, ("BOOLEAN",)),
    "RandomSize": NodeSpec({"seed": "INT"}, ("INT",)),
    "LatentUpscale": NodeSpec({"samples": "LATENT", "width": "INT", "height": "INT"}, ("LATENT",)),
    "LatentUpscaleBy": NodeSpec({"samples": "LATENT", "scale_by": "FLOAT"}, ("LATENT",)),
    "TrimVideoLatent": NodeSpec({"samples": "LATENT", "trim_amount": "INT"}, ("LATENT",)),
    "LatentConcat": NodeSpec({"samples1": "LATENT", "samples2": "LATENT", "dim": "COMBO"}, ("LATENT",)),
    "LatentCut": NodeSpec({"samples": "LATENT", "dim": "COMBO", "index": "INT", "amount": "INT"}, ("LATENT",)),
    "LatentCutToBatch": NodeSpec({"samples": "LATENT", "dim": "COMBO", "slice_size": "INT"}, ("LATENT",)),
    "RepeatLatentBatch": NodeSpec({"samples": "LATENT", "amount": "INT"}, ("LATENT",)),
    "SomebodysLatentFilter": NodeSpec({"samples": "LATENT"}, ("LATENT",)),
    "SplitSigmas": NodeSpec({"sigmas": "SIGMAS", "step": "INT"}, ("SIGMAS", "SIGMAS")),
    "ModelPatchLoader": NodeSpec({"name": "COMBO"}, ("MODEL_PATCH",)),
    "PatchModel": NodeSpec({"model": "MODEL", "patch": "MODEL_PATCH"}, ("MODEL",)),
    "WanCameraEmbedding": NodeSpec(
        {"width": "INT", "height": "INT"}, ("WAN_CAMERA_EMBEDDING", "INT", "INT"), False, {}, ("camera", "width", "height")
    ),
    "SomebodysCamera": NodeSpec(
        {"width": "INT", "height": "INT"}, ("CAMERA", "INT", "INT"), False, {}, ("camera", "width", "height")
    ),
    "WanReferenceToVideo": NodeSpec(
        {
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "vae": "VAE",
            "width": "INT",
            "height": "INT",
            "length": "INT",
            "batch_size": "INT",
            "ref_image": "IMAGE",
        },
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "Reroute": NodeSpec({"": "*"}, ("*",)),
    "ComfySwitchNode": NodeSpec(
        {"switch": "BOOLEAN", "on_false": "COMFY_MATCHTYPE_V3", "on_true": "COMFY_MATCHTYPE_V3"}, ("COMFY_MATCHTYPE_V3",)
    ),
    "ComfyMathExpression": NodeSpec({"expression": "STRING", "values": "COMFY_AUTOGROW_V3"}, ("FLOAT", "INT", "BOOLEAN")),
}


def checkpoint(path: str, *tensors: tuple[str, str, tuple[int, ...]]) -> Checkpoint:
    """A header with these (name, dtype, shape) tensors."""
    infos = {}
    for name, dtype, shape in tensors:
        elements = 1
        for size in shape:
            elements *= size
        infos[name] = TensorInfo(name, dtype, shape, elements * BITS[dtype] // 8)
    return Checkpoint(path, sum(info.nbytes for info in infos.values()) + 8, infos, {})


def wan_dit(path: str, units: int, dim: int = 1536, dtype: str = "F16", out: int = 16) -> Checkpoint:
    """A file that is detected as a WAN diffusion model and whose 16-bit weights take `units` UNITs and a few KB."""
    return checkpoint(
        path,
        ("head.modulation", "F16", (1, 2, dim)),
        ("head.head.weight", "F16", (out * 4, dim)),
        ("patch_embedding.weight", "F16", (dim, out, 1, 2, 2)),
        ("blocks.0.ffn.0.weight", "F16", (4 * dim, 1)),
        *((f"blocks.{block}.bulk.weight", dtype, (size, UNIT // 2)) for block, size in enumerate(in_layers(units))),
    )


def in_layers(units: int, largest: int = 64) -> list[int]:
    """So many UNITs as layers of at most `largest`: what streams takes the room of a layer or a few, never of a model."""
    return [min(largest, units - start) for start in range(0, units, largest)]


FILES: Mapping[tuple[str, str], Checkpoint] = {
    ("diffusion_models", "high_noise.safetensors"): wan_dit("/m/high_noise.safetensors", 6000),
    ("diffusion_models", "low_noise.safetensors"): wan_dit("/m/low_noise.safetensors", 6000),
    ("diffusion_models", "five.safetensors"): wan_dit("/m/five.safetensors", 100, dim=3072, out=48),
    ("text_encoders", "umt5.safetensors"): checkpoint(
        "/m/umt5.safetensors",
        ("encoder.block.23.layer.1.DenseReluDense.wi_1.weight", "F8_E4M3", (200, UNIT)),
        ("encoder.final_layer_norm.weight", "F16", (1,)),
        ("spiece_model", "U8", (5 * UNIT,)),
    ),
    ("vae", "vae.safetensors"): checkpoint("/m/vae.safetensors", ("decoder.middle.0.residual.0.gamma", "F32", (10, UNIT // 2))),
    ("clip_vision", "vision.safetensors"): checkpoint(
        "/m/vision.safetensors", ("vision_model.encoder.layers.0.layer_norm1.weight", "F16", (20, UNIT // 2))
    ),
    ("loras", "fast.safetensors"): checkpoint("/m/fast.safetensors", ("blocks.0.q.lora_down.weight", "F16", (7, UNIT // 2))),
    ("model_patches", "patch.safetensors"): checkpoint("/m/patch.safetensors", ("proj.weight", "F16", (9, UNIT // 2))),
    ("checkpoints", "whole.safetensors"): checkpoint(
        "/m/whole.safetensors",
        ("model.diffusion_model.head.modulation", "F16", (1, 2, 128)),
        ("model.diffusion_model.head.head.weight", "F16", (64, 128)),
        ("model.diffusion_model.patch_embedding.weight", "F16", (128, 16, 1, 2, 2)),
        ("model.diffusion_model.blocks.0.ffn.0.weight", "F16", (512, 1)),
        ("model.diffusion_model.blocks.0.bulk.weight", "F16", (50, UNIT // 2)),
        ("text_encoders.umt5xxl.encoder.block.23.layer.1.DenseReluDense.wi_1.weight", "F8_E4M3", (30, UNIT)),
        ("text_encoders.umt5xxl.encoder.final_layer_norm.weight", "F16", (1,)),
        ("vae.decoder.middle.0.residual.0.gamma", "F16", (4, UNIT // 2)),
    ),
}


def library(folder: str, name: str) -> Checkpoint:
    """FILES, as a host's model folders."""
    found = FILES.get((folder, name))
    if found is None:
        raise MissingFileError(f"{name} is not in models/{folder}")
    return found


def card(units: int, margin: int = 0, free: int | None = None) -> Card:
    """A card of `units` UNITs, all free unless said."""
    return Card("test card", units * UNIT, (units if free is None else free) * UNIT, margin * UNIT)


def model(name: str, units: int, **fields: Any) -> ModelRef:
    """A model of `units` UNITs that needs no file."""
    ref = ModelRef(
        node_id="1",
        role="generator",
        file=name,
        path=f"/m/{name}",
        file_bytes=units * UNIT,
        resident_bytes=units * UNIT,
        architecture="WAN T2V 14B",
        dim=5120,
        usage_factor=1.0,
    )
    return replace(ref, **fields)


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    """One node of an API-format prompt; a link is written ("id", slot)."""
    return {
        "class_type": class_type,
        "inputs": {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()},
    }


def two_experts(fast: bool = False, **latent: object) -> dict[str, Any]:
    """The shape of the official WAN 2.2 14B workflow: two experts, a switch that adds LoRAs and shortens the schedule."""
    size = {"width": 640, "height": 640, "length": 81, "batch_size": 1, **latent}
    switch = ("70", 0)
    return {
        "71": node("CLIPLoader", clip_name="umt5.safetensors", type="wan", device="default"),
        "73": node("VAELoader", vae_name="vae.safetensors"),
        "75": node("UNETLoader", unet_name="high_noise.safetensors", weight_dtype="default"),
        "76": node("UNETLoader", unet_name="low_noise.safetensors", weight_dtype="default"),
        "70": node("PrimitiveBoolean", value=fast),
        "83": node("LoraLoaderModelOnly", model=("75", 0), lora_name="fast.safetensors", strength_model=1.0),
        "120": node("ComfySwitchNode", switch=switch, on_false=("75", 0), on_true=("83", 0)),
        "86": node("ModelSamplingSD3", model=("120", 0), shift=5.0),
        "82": node("ModelSamplingSD3", model=("76", 0), shift=5.0),
        "114": node("PrimitiveInt", value=20),
        "117": node("PrimitiveInt", value=4),
        "122": node("ComfySwitchNode", switch=switch, on_false=("114", 0), on_true=("117", 0)),
        "127": node("ComfyMathExpression", **{"expression": "floor(a / b)", "values.a": ("122", 0), "values.b": 2}),
        "116": node("PrimitiveFloat", value=3.5),
        "119": node("PrimitiveFloat", value=1),
        "124": node("ComfySwitchNode", switch=switch, on_false=("116", 0), on_true=("119", 0)),
        "89": node("CLIPTextEncode", text="a fox", clip=("71", 0)),
        "72": node("CLIPTextEncode", text="blurry", clip=("71", 0)),
        "74": node("EmptyHunyuanLatentVideo", **size),
        "81": node(
            "KSamplerAdvanced",
            model=("86", 0),
            positive=("89", 0),
            negative=("72", 0),
            latent_image=("74", 0),
            steps=("122", 0),
            cfg=("124", 0),
            start_at_step=0,
            end_at_step=("127", 1),
        ),
        "78": node(
            "KSamplerAdvanced",
            model=("82", 0),
            positive=("89", 0),
            negative=("72", 0),
            latent_image=("81", 0),
            steps=("122", 0),
            cfg=("124", 0),
            start_at_step=("127", 1),
            end_at_step=10000,
        ),
        "87": node("VAEDecode", samples=("78", 0), vae=("73", 0)),
        "80": node("SaveVideo", images=("87", 0)),
    }


def wan_model(dim: int, stride: int) -> ModelRef:
    """A diffusion model of this width, for phases that need no file."""
    channels = 48 if stride == 16 else 16
    arch = Architecture(
        "dit", "WAN", dim, 30, channels, channels, dim / 2222, stride, "t2v", FFN.get(dim, 4 * dim), max(1, dim // 128)
    )
    return replace(model("dit", 1), arch=arch, dim=dim, usage_factor=arch.usage_factor, spatial_stride=stride)


FFN = {1536: 8960, 3072: 14336, 5120: 13824}
"""Of the real models."""


def vae_model(stride: int) -> ModelRef:
    arch = Architecture("vae", "WAN VAE", spatial_stride=stride)
    return replace(model("vae", 1), role="vae", arch=arch, spatial_stride=stride)
