"""Forwards of the WAN diffusion models of an installed ComfyUI: its own classes, any device, inputs of the right shapes.

Runs in the Python of a ComfyUI whose checkout is on sys.path. Used by record_traces.py (on `meta`) and by tests/measure.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
Shape = tuple[int, int, int, int]
"""Batch and latent frames, height and width."""
Inputs = dict[str, Any]
Empty = Callable[..., torch.Tensor]


def _plain(shape: Shape, empty: Empty) -> Inputs:
    return {}


def _image(tokens: int) -> Callable[[Shape, Empty], Inputs]:
    return lambda shape, empty: {"clip_fea": empty(shape[0], tokens, 1280)}


def _vace(shape: Shape, empty: Empty) -> Inputs:
    batch, t, h, w = shape
    return {"vace_context": empty(batch, 1, 96, t, h, w), "vace_strength": [1.0]}


def _camera(shape: Shape, empty: Empty) -> Inputs:
    batch, t, h, w = shape
    return {"camera_conditions": empty(batch, 24, t, h * 8, w * 8)}


def _camera_image(shape: Shape, empty: Empty) -> Inputs:
    return _camera(shape, empty) | _image(257)(shape, empty)


def _sound(shape: Shape, empty: Empty) -> Inputs:
    """WanSoundImageToVideo with a reference image; it always sends a control video, and motion only when given."""
    batch, t, h, w = shape
    return {
        "audio_embed": empty(batch, 25, 1024, 4 * t),
        "reference_latent": empty(batch, 16, 1, h, w),
        "control_video": empty(batch, 16, t, h, w),
    }


def _sound_motion(shape: Shape, empty: Empty) -> Inputs:
    """The same with a motion to go on from: 73 frames, 19 latent ones."""
    batch, _, h, w = shape
    return _sound(shape, empty) | {"reference_motion": empty(batch, 16, 19, h, w)}


def _animate(shape: Shape, empty: Empty) -> Inputs:
    """WanAnimateToVideo: the first latent frame is the reference, pose and faces (512x512) belong to the others."""
    batch, t, h, w = shape
    return _image(257)(shape, empty) | {
        "pose_latents": empty(batch, 16, t - 1, h, w),
        "face_pixel_values": empty(batch, 3, 4 * (t - 2) + 1, 512, 512),
    }


def _humo(shape: Shape, empty: Empty) -> Inputs:
    batch, t, h, w = shape
    return {"reference_latent": empty(batch, 36, 1, h, w), "audio_embed": empty(batch, t, 8, 5, 1280)}


def _reference(shape: Shape, empty: Empty) -> Inputs:
    return {"reference_latent": empty(shape[0], 16, shape[2], shape[3])}


def _scail(shape: Shape, empty: Empty) -> Inputs:
    """WanSCAILToVideo: the pose is half as large in both directions."""
    batch, t, h, w = shape
    return _image(257)(shape, empty) | {
        "reference_latent": empty(batch, 20, 1, h, w),
        "pose_latents": empty(batch, 20, t, h // 2, w // 2),
    }


B1_3: dict[str, Any] = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
B5: dict[str, Any] = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
B14: dict[str, Any] = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
WAN = "comfy.ldm.wan.model"


@dataclass(frozen=True)
class Variant:
    """One WAN diffusion model. The configuration is what comfy/model_detection.py reads off the keys of the published files."""

    module: str
    cls: str
    config: dict[str, Any]
    in_dim: int = 16
    out_dim: int = 16
    extra: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Shape, Empty], Inputs] = _plain
    least_blocks: int = 0
    """Blocks below which a part of it would not run."""
    more_frames: int = 0
    """Latent frames that its node puts in front of those of the video."""

    @property
    def stride(self) -> int:
        """Pixels of a video per latent pixel, in both directions."""
        return 16 if self.out_dim == 48 else 8


VARIANTS: dict[str, Variant] = {
    "t2v-1.3b": Variant(WAN, "WanModel", B1_3),
    "t2v-14b": Variant(WAN, "WanModel", B14),
    "i2v-14b": Variant(WAN, "WanModel", B14, in_dim=36, extra={"model_type": "i2v"}, inputs=_image(257)),
    "flf2v-14b": Variant(
        WAN,
        "WanModel",
        B14,
        in_dim=36,
        extra={"model_type": "i2v", "flf_pos_embed_token_number": 514},
        inputs=_image(514),
    ),
    "i2v-a14b": Variant(WAN, "WanModel", B14, in_dim=36),
    "ti2v-5b": Variant(WAN, "WanModel", B5, in_dim=48, out_dim=48),
    "fun-control-14b": Variant(WAN, "WanModel", B14, in_dim=48, extra={"model_type": "i2v"}, inputs=_image(257)),
    "fun-control-a14b": Variant(WAN, "WanModel", B14, in_dim=52, extra={"in_dim_ref_conv": 16}, inputs=_reference),
    "vace-1.3b": Variant(
        WAN, "VaceWanModel", B1_3, extra={"model_type": "vace", "vace_layers": 15, "vace_in_dim": 96}, inputs=_vace
    ),
    "vace-14b": Variant(
        WAN, "VaceWanModel", B14, extra={"model_type": "vace", "vace_layers": 8, "vace_in_dim": 96}, inputs=_vace
    ),
    "camera-14b": Variant(WAN, "CameraWanModel", B14, in_dim=32, extra={"model_type": "camera"}, inputs=_camera_image),
    "camera-a14b": Variant(WAN, "CameraWanModel", B14, in_dim=36, extra={"model_type": "camera_2.2"}, inputs=_camera),
    "s2v-14b": Variant(WAN, "WanModel_S2V", B14, extra={"model_type": "s2v"}, inputs=_sound),
    "s2v-14b-motion": Variant(WAN, "WanModel_S2V", B14, extra={"model_type": "s2v"}, inputs=_sound_motion),
    "humo-17b": Variant(WAN, "HumoWanModel", B14, in_dim=36, extra={"model_type": "humo"}, inputs=_humo),
    "animate-14b": Variant(
        "comfy.ldm.wan.model_animate",
        "AnimateWanModel",
        B14,
        in_dim=36,
        extra={"model_type": "animate"},
        inputs=_animate,
        least_blocks=10,
        more_frames=1,
    ),
    "scail-14b": Variant(WAN, "SCAILWanModel", B14, in_dim=20, extra={"model_type": "scail"}, inputs=_scail),
    "causal-1.3b": Variant("comfy.ldm.wan.ar_model", "CausalWanModel", B1_3),
}


def present(variant: Variant) -> bool:
    """Whether the installed ComfyUI has the class."""
    try:
        return hasattr(importlib.import_module(variant.module), variant.cls)
    except ImportError:
        return False


def build(variant: Variant, weights: str, blocks: int | None, device: str = "meta") -> Any:
    """The model with `fp16` weights, or with `fp8` ones that every layer casts for itself. `blocks` caps its depth: all
    blocks use the memory of the ones before, so the peak does not depend on their number."""
    ops = importlib.import_module("comfy.ops")
    extra = dict(variant.extra)
    config = dict(variant.config)
    if blocks is not None:
        config["num_layers"] = max(blocks, variant.least_blocks)
        if "vace_layers" in extra:
            extra["vace_layers"] = max(1, config["num_layers"] * extra["vace_layers"] // variant.config["num_layers"])
        if "s2v" in str(extra.get("model_type")):
            extra["audio_inject_layers"] = [0, 2]
    dtype = FP8 if weights == "fp8" else torch.float16
    return getattr(importlib.import_module(variant.module), variant.cls)(
        **config,
        **({"model_type": "t2v"} | extra),
        in_dim=variant.in_dim,
        out_dim=variant.out_dim,
        text_dim=4096,
        freq_dim=256,
        patch_size=(1, 2, 2),
        device=device,
        dtype=dtype,
        operations=ops.manual_cast if weights == "fp8" else ops.disable_weight_init,
    )


def latent_shape(variant: Variant, batch: int, frames: int, height: int, width: int) -> Shape:
    return (batch, (frames - 1) // 4 + 1 + variant.more_frames, height // variant.stride, width // variant.stride)


def forward(model: Any, variant: Variant, shape: Shape, device: str = "meta") -> Callable[[], object]:
    """One forward in fp16. Its inputs are made here and outlive it: they are not part of what it allocates."""

    def empty(*size: int) -> torch.Tensor:
        return torch.zeros(size, device=device, dtype=torch.float16)

    x = empty(shape[0], variant.in_dim, *shape[1:])
    step = torch.zeros(shape[0], device=device)
    context = empty(shape[0], 512, 4096)
    inputs = variant.inputs(shape, empty)
    return lambda: model(x, step, context, transformer_options={}, **inputs)


def sequence_lengths(model: Any) -> list[int]:
    """Grows by one with every forward: the tokens that the first block is given, with those of references and poses."""
    seen: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def causal_forward(model: Any, shape: Shape, block: int, first: bool, device: str = "meta") -> Callable[[], object]:
    """A causal model's forward over `block` latent frames, the first or the last of a clip of `shape`; its caches of keys and
    values are made here, for the whole clip, as ComfyUI's sampler makes them (k_diffusion/sampling.py, sample_ar_video)."""
    batch, frames, h, w = shape
    per_frame = (h // 2) * (w // 2)
    keys = model.init_kv_caches(batch, frames * per_frame, device, torch.float16)
    crossed = model.init_crossattn_caches(batch, device, torch.float16)
    start = 0 if first else frames - block
    for cache in keys:
        cache["end"] = start * per_frame
    x = torch.zeros((batch, 16, block, h, w), device=device, dtype=torch.float16)
    step = torch.zeros(batch, device=device)
    context = torch.zeros((batch, 512, 4096), device=device, dtype=torch.float16)
    state = {"start_frame": start, "kv_caches": keys, "crossattn_caches": crossed}
    if not first:  # the first block of a clip has filled them
        for cache in crossed:
            cache["k"] = torch.zeros((batch, 512, model.dim), device=device, dtype=torch.float16)
            cache["v"] = torch.zeros_like(cache["k"])
            cache["is_init"] = True
    return lambda: model(x, step, context, transformer_options={"ar_state": state})
