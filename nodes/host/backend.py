"""How this ComfyUI will run a forward, as far as its memory depends on it: read from the running one, touching no memory."""

from __future__ import annotations

import importlib
import logging
import os
from importlib import metadata
from typing import Any

import comfy.model_management as model_management
import comfyui_version
import torch

from ...vram.estimate.backend import Allocator, Attention, Backend, Correction, parse_version
from .pages import dynamic_vram_is_on

logger = logging.getLogger("vram_headroom")

FUSED_RMS_NORM_SINCE = (2, 9, 0)
"""torch 2.9 gave RMSNorm a kernel of its own on CUDA and ROCm (pytorch pull request 153666); before, it is a chain."""

CUDNN_BUG = (91002, 91500)
"""From the first of these versions of cuDNN on and before the second, conv3d of torch 2.9 takes more (comfy/ops.py)."""

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch reads its allocator's options: the first name, and the one that torch 2.9 added."""


def read_backend(corrections: tuple[Correction, ...] = ()) -> Backend:
    """What forwards of this ComfyUI run on, with what its self-check found. Raises nothing: what can't be asked is unknown."""
    device = _ask(model_management, "get_torch_device")
    kind = str(getattr(device, "type", ""))
    vae_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    kept = _ask(model_management, "unet_dtype", device)
    # None where it is the type that weights are kept in
    cast = _ask(model_management, "unet_manual_cast", kept, device)
    return Backend(
        comfyui=parse_version(str(getattr(comfyui_version, "__version__", ""))),
        fused_rope=_fused_rope(kind),
        fused_rms_norm=_fused_rms_norm(kind),
        attention=_attention(),
        allocator=_allocator(kind),
        element_bytes=_item_bytes(cast or kept),
        weight_bytes=_item_bytes(kept),
        vae_element_bytes=_item_bytes(_ask(model_management, "vae_dtype", device, vae_dtypes)),
        slow_conv3d=_slow_conv3d(kind),
        corrections=corrections,
    )


def kitchen_version() -> str:
    """Version of comfy-kitchen, which holds ComfyUI's own kernels; empty without it."""
    try:
        return metadata.version("comfy-kitchen")
    except Exception:
        # a missing package, or a broken record of one
        return ""


def _ask(owner: Any, name: str, *arguments: Any) -> Any:
    """What `owner.name(*arguments)` returns; None where there is no such function or it fails."""
    function = getattr(owner, name, None)
    if not callable(function):
        return None
    try:
        return function(*arguments)
    except Exception:
        # ComfyUI's or another pack's: an answer that can't be had is no answer
        logger.debug("%s can't be asked", name, exc_info=True)
        return None


def _item_bytes(dtype: object) -> int:
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def _fused_rope(kind: str) -> bool | None:
    """WAN's rotary embedding is comfy-kitchen's `apply_rope1`: one kernel if a backend other than `eager` serves it here."""
    if not kind:
        return None
    if kind != "cuda":
        return False
    try:
        kitchen = importlib.import_module("comfy.quant_ops").ck
    except (ImportError, AttributeError):
        return False
    backends = _ask(kitchen, "list_backends")
    if not isinstance(backends, dict):
        return None
    return any(
        name != "eager"
        and isinstance(state, dict)
        and bool(state.get("available"))
        and not state.get("disabled")
        and "apply_rope1" in state.get("capabilities", ())
        for name, state in backends.items()
    )


def _fused_rms_norm(kind: str) -> bool | None:
    if kind == "cpu":
        return False
    version = parse_version(str(torch.__version__))
    return version >= FUSED_RMS_NORM_SINCE if kind == "cuda" and version is not None else None


def _slow_conv3d(kind: str) -> bool:
    """Whether 3D convolutions take more than they should: ComfyUI's test, where it does not call cuDNN's own in their place
    (comfy/ops.py, NVIDIA_MEMORY_CONV_BUG_WORKAROUND)."""
    cudnn = _ask(torch.backends.cudnn, "version") if kind == "cuda" else None
    torch_version = parse_version(str(torch.__version__))
    if not isinstance(cudnn, int) or torch_version is None:
        return False
    affected = CUDNN_BUG[0] <= cudnn < CUDNN_BUG[1] and torch_version >= (2, 9, 0)
    try:
        around = bool(importlib.import_module("comfy.ops").NVIDIA_MEMORY_CONV_BUG_WORKAROUND)
    except (ImportError, AttributeError):
        around = False
    return affected and not around


def _attention() -> Attention:
    """In the order in which comfy/ldm/modules/attention.py chooses. Whichever of the middle two it is, memory grows alike."""
    if _ask(model_management, "comfy_kitchen_attention_enabled"):
        return "unknown"
    if _ask(model_management, "sage_attention_enabled"):
        return "sage"
    if _ask(model_management, "flash_attention_enabled") or _ask(model_management, "xformers_enabled"):
        return "flash"
    if _ask(model_management, "pytorch_attention_flash_attention"):
        return "flash"
    # PyTorch's attention on a device that ComfyUI does not know to have a kernel that saves memory, or not known at all
    return "split" if _ask(model_management, "pytorch_attention_enabled") is False else "unknown"


def _allocator(kind: str) -> Allocator:
    if kind != "cuda" or dynamic_vram_is_on():
        return "unknown"
    if any("expandable_segments:true" in os.environ.get(name, "").replace(" ", "").lower() for name in ALLOCATOR_SETTINGS):
        return "unknown"
    match _ask(torch.cuda, "is_available") and _ask(torch.cuda, "get_allocator_backend"):
        case "native":
            return "native"
        case "cudaMallocAsync":
            return "cudaMallocAsync"
        case _:
            return "unknown"
