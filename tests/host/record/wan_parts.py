"""Forwards of what surrounds a WAN model in an installed ComfyUI: a sampling step, both VAEs, the text and image encoders.

Runs in the Python of a ComfyUI whose checkout is on sys.path. Used by record_traces.py (on `meta`) and by tests/measure.py.
"""

from __future__ import annotations

import importlib
import inspect
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import wan_forwards as wan

VAES = {
    "2.1": ("comfy.ldm.wan.vae", {"dim": 96, "z_dim": 16, "image_channels": 3, "conv_out_channels": 3}, 8),
    "2.2": ("comfy.ldm.wan.vae2_2", {"dim": 160, "z_dim": 48}, 16),
}
"""Module, configuration (comfy/sd.py, VAE.__init__) and pixels per latent pixel."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": wan.FP8}


def vae(kind: str, dtype: str, device: str = "meta") -> Any:
    module, config, _ = VAES[kind]
    cls = importlib.import_module(module).WanVAE
    common = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
    known = inspect.signature(cls).parameters
    with torch.device(device):
        return cls(**{name: value for name, value in (common | config).items() if name in known}).to(DTYPES[dtype]).eval()


def vae_forward(
    model: Any, kind: str, way: str, dtype: str, frames: int, height: int, width: int, device: str = "meta"
) -> Callable[[], object]:
    """`decode` of the latents, or `encode` of the pixels, of one clip, which is made here and outlives it."""
    _, config, stride = VAES[kind]
    if way == "decode":
        shape = (1, config["z_dim"], (frames - 1) // 4 + 1, height // stride, width // stride)
    else:
        shape = (1, 3, frames, height, width)
    given = torch.zeros(shape, dtype=DTYPES[dtype], device=device)
    return lambda: getattr(model, way)(given)


def text_encoder(weights: str, device: str = "meta") -> Any:
    """UMT5-XXL, which ComfyUI computes in fp32. `fp8`: as in the published file, whose embedding stays in fp16; `fp8-all`: the
    embedding too, which is then cast to fp32 as a whole."""
    dtype = wan.FP8 if weights.startswith("fp8") else torch.float16
    model = importlib.import_module("comfy.text_encoders.wan").UMT5XXlModel(device=device, dtype=dtype).eval()
    if weights == "fp8":
        model.transformer.shared.to(torch.float16)
    return model


def text_forward(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    given = [[(n % 1000) + 2 for n in range(tokens - 1)] + [1] for _ in range(batch)]
    return lambda: model(given)


def image_encoder(device: str = "meta") -> Any:
    """CLIP vision H with fp16 weights, as comfy/clip_vision.py builds it."""
    module = importlib.import_module("comfy.clip_vision")
    config = json.loads((Path(str(module.__file__)).parent / "clip_vision_config_h.json").read_text(encoding="utf-8"))
    ops = importlib.import_module("comfy.ops")
    cls = importlib.import_module("comfy.clip_model").CLIPVisionModelProjection
    return cls(config, torch.float16, device, ops.manual_cast).eval()


def image_forward(model: Any, batch: int, device: str = "meta") -> Callable[[], object]:
    pixels = torch.zeros((batch, 3, 224, 224), device=device)
    return lambda: model(pixel_values=pixels, intermediate_output=-2)


def lora_layer(weights: str, device: str = "meta", rank: int = 64) -> Callable[[], object]:
    """The largest linear layer of a 14B, with a LoRA that is added to its weight whenever it runs, over one token."""
    ops = importlib.import_module("comfy.ops")
    lora = importlib.import_module("comfy.weight_adapter.lora")
    patch = importlib.import_module("comfy.model_patcher").LowVramPatch
    layer = ops.manual_cast.Linear(5120, 13824, device=device, dtype=DTYPES[weights])
    up = torch.zeros((13824, rank), device=device, dtype=torch.float16)
    down = torch.zeros((rank, 5120), device=device, dtype=torch.float16)
    adapter = lora.LoRAAdapter(set(), (up, down, float(rank), None, None, None))
    layer.weight_function = [patch("weight", {"weight": [(1.0, adapter, 1.0, None, None)]})]
    given = torch.zeros((1, 5120), device=device, dtype=torch.float16)
    return lambda: layer(given)


class _Patcher:
    """What a sampling step asks of its model patcher; `free` decides whether the conditions are batched."""

    def __init__(self, free: int) -> None:
        self._free = free

    def get_free_memory(self, device: Any) -> int:
        return self._free

    def apply_hooks(self, hooks: Any) -> dict[str, Any]:
        return {}

    def prepare_state(self, *args: Any) -> None: ...

    def is_dynamic(self) -> bool:
        return False


def step_model(name: str, weights: str, blocks: int, device: str = "meta") -> Any:
    """The model as the sampler sees it: model_base's class around the diffusion model."""
    variant = wan.VARIANTS[name]
    base = importlib.import_module("comfy.model_base")
    supported = importlib.import_module("comfy.supported_models")
    config = (supported.WAN22_T2V if variant.out_dim == 48 else supported.WAN21_T2V)(
        {"dim": variant.config["dim"], "disable_unet_model_creation": True, "image_model": "wan2.1"}
    )
    config.manual_cast_dtype = torch.float16 if weights == "fp8" else None
    model = (base.WAN22 if variant.out_dim == 48 else base.WAN21)(config, image_to_video=variant.in_dim == 36, device=device)
    model.diffusion_model = wan.build(variant, weights, blocks, device)
    return model


def step_forward(
    model: Any, name: str, shape: wan.Shape, ncond: int, batched: bool, device: str = "meta"
) -> Callable[[], object]:
    """One sampling step over `ncond` conditions (2: prompt and negative prompt), at once or one after the other. The latent
    (fp32), the texts and the image latents are made here and outlive it."""
    samplers = importlib.import_module("comfy.samplers")
    conds = importlib.import_module("comfy.conds")
    variant = wan.VARIANTS[name]
    free = 1 << 60 if batched else 0
    model.current_patcher = _Patcher(free)
    # ComfyUI before the patcher was asked; this process does nothing but tracing.
    vars(importlib.import_module("comfy.model_management"))["get_free_memory"] = lambda *args, **kwargs: free
    x = torch.zeros((shape[0], variant.out_dim, *shape[1:]), device=device)
    sigma = torch.full((shape[0],), 0.5, device=device)
    concat = variant.in_dim - variant.out_dim

    def condition() -> list[dict[str, Any]]:
        given = {"c_crossattn": conds.CONDRegular(torch.zeros((1, 512, 4096), device=device))}
        if concat:
            given["c_concat"] = conds.CONDNoiseShape(torch.zeros((shape[0], concat, *shape[1:]), device=device))
        return [{"model_conds": given, "uuid": uuid.uuid4()}]

    both = [condition() for _ in range(ncond)]
    return lambda: samplers.calc_cond_batch(model, both, x, sigma, {})
