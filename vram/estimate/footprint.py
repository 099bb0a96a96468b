"""A file, its load options and a card: the bytes it takes there once fully loaded.

The rules are ComfyUI's (comfy/sd.py load_diffusion_model_state_dict, comfy/model_management.py unet_dtype, comfy/utils.py
convert_old_quants), by tensor: quantised layers stay as stored, the rest goes to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .checkpoint import Checkpoint, TensorInfo

FLOAT_DTYPES: Final = frozenset({"F16", "BF16", "F32", "F64"})
FP8_DTYPES: Final = frozenset({"F8_E4M3", "F8_E5M2"})

TOKENIZER_KEYS: Final = frozenset({"spiece_model", "tekken_model", "tokenizer_json"})
"""Tokenizers that travel inside a text encoder's file and never reach the card."""

PATCH_EMBEDDING_BYTES: Final = 4
"""WAN keeps patch_embedding in fp32 (ComfyUI comfy/ldm/wan/model.py)."""

SCHEDULE_BYTES: Final = 4000
"""Every diffusion model carries 1000 fp32 sigmas (ComfyUI comfy/model_sampling.py ModelSamplingDiscreteFlow)."""

LOGIT_SCALE_BYTES: Final = 4
"""Every text encoder carries one fp32 logit_scale (ComfyUI comfy/sd1_clip.py SDClipModel)."""

FP8_KEEP_SHARE: Final = 0.88
"""Plain fp8 is kept when 16 bit would take more than 0.88 of the card less the inference minimum (unet_dtype)."""


def is_quantised(checkpoint: Checkpoint) -> bool:
    """The file carries scales: fp8_scaled, or ComfyUI's per-layer quantisation."""
    return (
        "scaled_fp8" in checkpoint.tensors
        or "_quantization_metadata" in checkpoint.metadata
        or any(name.endswith((".scale_weight", ".comfy_quant", ".weight_scale")) for name in checkpoint.tensors)
    )


def diffusion_model_bytes(
    checkpoint: Checkpoint,
    *,
    weight_dtype: str = "default",
    compute_bytes: int = 2,
    fp8_compute: bool = False,
    card_total: int = 0,
    minimum_inference: int = 0,
) -> int:
    """Resident bytes of a WAN diffusion model. `weight_dtype` is UNETLoader's option; sizes of the card in bytes."""
    quantised = is_quantised(checkpoint)
    majority = _majority_dtype(checkpoint.tensors)
    plain_fp8 = majority in FP8_DTYPES and not quantised
    keep_fp8 = plain_fp8 and (
        fp8_compute or checkpoint.parameters * compute_bytes > card_total * FP8_KEEP_SHARE - minimum_inference
    )
    cast_all_to = 1 if (weight_dtype.startswith("fp8") and not quantised) or keep_fp8 else None
    total = SCHEDULE_BYTES
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith("patch_embedding.weight") or tensor.name.endswith("patch_embedding.bias"):
            total += tensor.elements * PATCH_EMBEDDING_BYTES
        elif quantised and _stays_as_stored(tensor):
            total += tensor.nbytes
        elif tensor.dtype in FLOAT_DTYPES or tensor.dtype in FP8_DTYPES:
            total += tensor.elements * (cast_all_to or compute_bytes)
        else:
            total += tensor.nbytes
    return total


def text_encoder_bytes(checkpoint: Checkpoint, *, compute_bytes: int = 2) -> int:
    """Resident bytes of a text encoder: fp8 and quantised layers as stored, the rest in 16 bit, without its tokenizer."""
    quantised = is_quantised(checkpoint)
    total = LOGIT_SCALE_BYTES
    for tensor in checkpoint.tensors.values():
        if tensor.name in TOKENIZER_KEYS:
            continue
        if tensor.dtype in FP8_DTYPES or (quantised and _stays_as_stored(tensor)) or tensor.dtype not in FLOAT_DTYPES:
            total += tensor.nbytes
        else:
            total += tensor.elements * compute_bytes
    return total


def cast_bytes(checkpoint: Checkpoint, *, compute_bytes: int = 2) -> int:
    """Resident bytes of a model that is cast to one dtype whatever the file says: VAE, CLIP vision."""
    return sum(
        tensor.elements * compute_bytes if tensor.dtype in FLOAT_DTYPES else tensor.nbytes
        for tensor in checkpoint.tensors.values()
    )


def _stays_as_stored(tensor: TensorInfo) -> bool:
    return tensor.dtype not in FLOAT_DTYPES or tensor.name.endswith(("scale_weight", "weight_scale", "scale_input"))


def _majority_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of most elements, as ComfyUI's weight_dtype counts (comfy/utils.py)."""
    elements: dict[str, int] = {}
    for tensor in tensors.values():
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return max(elements, key=lambda dtype: elements[dtype]) if elements else ""
