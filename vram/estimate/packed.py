"""GGUF files as ComfyUI-GGUF keeps them (city96/ComfyUI-GGUF loader.py, ops.py, nodes.py; read, not run)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from .checkpoint import Checkpoint, TensorInfo
from .loading import Cast, Footprint, LoadRules
from .quantisation import GGUF_AS_TORCH, GGUF_DEQUANTISE, GGUF_DEQUANTISE_UNKNOWN
from .weights import ALWAYS_FP32, BLOCK, LORA_PATCHING, Choice, Kept, element_bytes, footprint_of, terms

ENCODER_TYPE_KEYS: Final = ("encoder.final_layer_norm.weight", "model.layers.0.self_attn.k_proj.weight")
"""Tensors whose type a text encoder is loaded in (comfy/text_encoders/sd3_clip.py t5_xxl_detect, comfy/sd.py llama_detect)."""


GGML_TYPE: Final = re.compile(r"I?Q\d.*|TQ\d.*")
"""Names of ggml's block types; safetensors has no such."""


def is_packed(checkpoint: Checkpoint) -> bool:
    """It is a GGUF file, by what its reader says or by its types."""
    if getattr(checkpoint, "format", None) == "gguf":
        return True
    return any(GGML_TYPE.fullmatch(tensor.dtype) for tensor in checkpoint.tensors.values())


def packed_diffusion_model(tensors: Mapping[str, TensorInfo], rules: LoadRules, patched: bool, constant: int) -> Footprint:
    """A diffusion model: packed, but for what no Linear, convolution or norm of its own holds."""
    kept: list[Kept] = []
    for tensor in tensors.values():
        layer = tensor.name.rpartition(".")[0]
        weight = tensors.get(f"{layer}.weight")
        if ALWAYS_FP32.fullmatch(tensor.name):
            kept.append(Kept(tensor.name, 4 * tensor.elements))
        elif tensor.dtype not in GGUF_AS_TORCH or (weight is not None and _in_own_layer(weight)):
            kept.append(Kept(tensor.name, tensor.nbytes))
        else:
            kept.append(Kept(tensor.name, rules.weight_bytes * tensor.elements))
    return _footprint(kept, tensors, rules, patched, constant)


def _in_own_layer(weight: TensorInfo) -> bool:
    """Its bias and itself are kept as stored: a Linear, or any layer whose weight is packed."""
    return len(weight.shape) == 2 or weight.dtype not in GGUF_AS_TORCH


def packed_text_encoder(tensors: Mapping[str, TensorInfo], rules: LoadRules, constant: int) -> Footprint:
    """A text encoder: the vocabulary is unpacked to fp16, what is not a Linear takes the type of the last norm."""
    norm = next((tensors[key] for key in ("enc.output_norm.weight", ENCODER_TYPE_KEYS[0]) if key in tensors), None)
    width = element_bytes(norm) if norm is not None else 2
    kept: list[Kept] = []
    for tensor in tensors.values():
        if tensor.name in ("token_embd.weight", "shared.weight"):
            kept.append(Kept(tensor.name, 2 * tensor.elements))
        elif tensor.dtype in GGUF_AS_TORCH and (len(tensor.shape) < 2 or "attn_rel_b" in tensor.name):
            kept.append(Kept(tensor.name, width * tensor.elements))
        else:
            kept.append(Kept(tensor.name, tensor.nbytes))
    return _footprint(kept, tensors, rules, False, constant)


def _footprint(
    kept: list[Kept], tensors: Mapping[str, TensorInfo], rules: LoadRules, patched: bool, constant: int
) -> Footprint:
    packed = [tensors[tensor.name] for tensor in kept if tensors[tensor.name].dtype not in GGUF_AS_TORCH]
    running = [tensor for tensor in packed if BLOCK.match(tensor.name) or ".blk." in tensor.name] or packed
    transient = max((_dequantising(tensor, patched) for tensor in running), default=0)
    untraced = {tensor.dtype for tensor in packed if tensor.dtype not in GGUF_DEQUANTISE}
    assumption = f"unpacking {', '.join(sorted(untraced))} is taken to need as much as the worst type that was traced"
    cast: Cast = "dequantise" if packed else "none"
    choice = Choice(rules.weight_bytes, rules.weight_bytes, rules.compute_bytes, cast)
    plain = footprint_of(kept, tensors, rules, False, constant, choice)
    largest = max(packed, key=lambda tensor: tensor.nbytes, default=None)
    name = "the block's largest weight, unpacked and patched" if patched else "the block's largest weight, unpacked"
    return Footprint(
        resident=plain.resident,
        booked=plain.resident + (2 * largest.elements if largest is not None else 0),
        staged_bytes=plain.resident,
        largest_layer=plain.largest_layer,
        cast=cast,
        transients=terms((name, transient)),
        streaming=terms(("a layer on its way", plain.largest_layer)),
        modules=plain.modules,
        assumptions=(assumption,) if untraced else (),
    )


def _dequantising(tensor: TensorInfo, patched: bool) -> int:
    """Bytes above the packed weight while it is unpacked, and patched in fp32 by ComfyUI-GGUF where a LoRA is on it."""
    unpacking = GGUF_DEQUANTISE.get(tensor.dtype, GGUF_DEQUANTISE_UNKNOWN)
    return round(tensor.elements * (max(unpacking, 2 + LORA_PATCHING) if patched else unpacking))
