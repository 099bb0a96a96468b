"""A file, its load options and a card: the bytes it takes there, by the rules ComfyUI loads by, tensor by tensor.

The rules are those of comfy/sd.py (load_diffusion_model_state_dict, CLIP, VAE), comfy/model_management.py (unet_dtype,
unet_manual_cast, vae_dtype), comfy/utils.py and comfy/ops.py of 0.8 and 0.33, which agree on everything here but the formats of
quantisation that 0.8 refuses. tests/data/footprints.json holds the sizes that both gave for files in every format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from ..units import say_gib
from .architecture import NOT_PARAMETER, PREFIXES, identify_dit, logical_elements
from .checkpoint import Checkpoint, TensorInfo
from .loading import Cast, Footprint, LoadRules, Module
from .packed import ENCODER_TYPE_KEYS, is_packed, packed_diffusion_model, packed_text_encoder
from .quantisation import FLOAT_DTYPES, FORMATS_OF_0_8, FP8_DTYPES, SCALES, Layer, quantised_layers
from .weights import ALWAYS_FP32, Choice, Kept, element_bytes, footprint_of

__all__ = [
    "Footprint",
    "LoadRules",
    "Module",
    "cast_bytes",
    "clip_vision",
    "diffusion_model",
    "diffusion_model_bytes",
    "is_quantised",
    "text_encoder",
    "text_encoder_bytes",
    "vae",
]

SCHEDULE_BYTES: Final = 4000
"""Every diffusion model carries 1000 fp32 sigmas (ComfyUI comfy/model_sampling.py ModelSamplingDiscreteFlow)."""

LOGIT_SCALE_BYTES: Final = 4
"""Every text encoder carries one fp32 logit_scale (ComfyUI comfy/sd1_clip.py SDClipModel)."""

FP8_KEEP_SHARE: Final = 0.88
"""Plain fp8 is kept when 16 bit would take more than 0.88 of the card less the inference minimum (maximum_vram_for_weights)."""


INTEGER_BITS: Final[Mapping[str, int]] = {"int8_tensorwise": 8, "asym_w4a8_int8": 8, "convrot_w4a4": 4}
"""Formats whose products are of integers, and the bits of their inputs (comfy/quant_ops.py QUANT_ALGOS, 0.33)."""


def diffusion_model(
    checkpoint: Checkpoint, *, weight_dtype: str = "default", rules: LoadRules | None = None, patched: bool = False
) -> Footprint:
    """A diffusion model. `weight_dtype` is UNETLoader's option, which GGUF loaders do not have; `patched`: LoRAs are on it."""
    rules = rules or LoadRules()
    tensors = _bare(checkpoint)
    if is_packed(checkpoint):
        return packed_diffusion_model(tensors, rules, patched, SCHEDULE_BYTES)
    layers = quantised_layers(tensors, checkpoint.metadata)
    choice = _choice(tensors, layers, weight_dtype, rules)
    kept = [_kept(tensor, tensors, layers, choice) for tensor in tensors.values() if not _is_mark(tensor, layers)]
    kept.extend(Kept(f"{name}.comfy_quant", layer.mark_bytes) for name, layer in layers.items())
    return footprint_of(kept, tensors, rules, patched, SCHEDULE_BYTES, choice)


def text_encoder(checkpoint: Checkpoint, *, rules: LoadRules | None = None) -> Footprint:
    """A text encoder, without the tokenizer in its file. Its fp32 copies are counted with its activations."""
    rules = rules or LoadRules()
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in TOKENIZER_KEYS}
    if is_packed(checkpoint):
        return packed_text_encoder(tensors, rules, LOGIT_SCALE_BYTES)
    layers = quantised_layers(tensors, checkpoint.metadata)
    told = next((tensors[key] for key in ENCODER_TYPE_KEYS if key in tensors), None)
    kept: list[Kept] = []
    for tensor in tensors.values():
        if _is_mark(tensor, layers):
            continue
        if told is not None:
            choice = Choice(weight=element_bytes(told), linear=element_bytes(told), compute=4, cast="cast")
            kept.append(_kept(tensor, tensors, layers, choice))
        else:  # nothing says which type it is loaded in
            kept.append(Kept(tensor.name, 2 * tensor.elements if tensor.dtype in FLOAT_DTYPES else tensor.nbytes))
    kept.extend(Kept(f"{name}.comfy_quant", layer.mark_bytes) for name, layer in layers.items())
    choice = Choice(2, 2, 4, "cast", assumptions=() if told else ("the type this encoder is loaded in is not known",))
    return footprint_of(kept, tensors, rules, False, LOGIT_SCALE_BYTES, choice, fp32_apart=False)


def vae(checkpoint: Checkpoint, *, rules: LoadRules | None = None) -> Footprint:
    """A VAE: cast to its own type, bf16 or fp16 where the card has it, whatever the file says."""
    rules = rules or LoadRules()
    return _cast_whole(checkpoint, rules, rules.vae_bytes)


def clip_vision(checkpoint: Checkpoint, *, rules: LoadRules | None = None) -> Footprint:
    """An image encoder: fp16 whatever the file and the card (comfy/clip_vision.py), but for what is always fp32."""
    return _cast_whole(checkpoint, rules or LoadRules(), 2)


def _cast_whole(checkpoint: Checkpoint, rules: LoadRules, width: int) -> Footprint:
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith("position_ids")}
    kept = [
        Kept(name, tensor.elements * (4 if ALWAYS_FP32.fullmatch(name) else width) if _is_float(tensor) else tensor.nbytes)
        for name, tensor in tensors.items()
    ]
    return footprint_of(kept, tensors, rules, False, 0, Choice(width, width, width, "none"))


# the rules


def _choice(tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer], weight_dtype: str, rules: LoadRules) -> Choice:
    asked = weight_dtype.startswith("fp8_")
    assumptions: list[str] = []
    if not asked and weight_dtype != "default":
        assumptions.append(f"the weight_dtype {weight_dtype!r} is not ComfyUI's; it is taken for the default")
    if layers:
        unknown = {layer.format for layer in layers.values()} - (FORMATS_OF_0_8 if _is_old(rules) else set())
        if _is_old(rules) and unknown:
            assumptions.append(f"this ComfyUI cannot load {', '.join(sorted(unknown))}; a newer one can")
        if any(layer.format == "unknown" for layer in layers.values()):
            assumptions.append("some layers are quantised in a format that is not known; they are counted as stored")
        if any(name.endswith(".scale_input") for name in tensors):
            assumptions.append("scales of inputs are counted, though ComfyUI drops those that are 1")
        native = all(_is_native(layer, rules) for layer in layers.values())
        cast: Cast = "native" if native else "dequantise"
        integers = [bits for layer in layers.values() if native and (bits := INTEGER_BITS.get(layer.format))]
        return Choice(
            1 if asked else rules.weight_bytes,
            rules.compute_bytes,
            rules.compute_bytes,
            cast,
            assumptions=tuple(assumptions),
            integer_bits=min(integers, default=None),
        )
    if asked:
        fast = weight_dtype.endswith("_fast") and rules.fp8_compute
        return Choice(1, 1, rules.compute_bytes, "native" if fast else "cast", assumptions=tuple(assumptions))
    width, kept, step = rules.weight_bytes, None, None
    if _majority(tensors.values()) in FP8_DTYPES:
        # ComfyUI counts two bytes whatever the type it would choose
        wide = 2 * sum(tensor.elements for name, tensor in tensors.items() if name != "scaled_fp8")
        fits = wide <= rules.card_total * FP8_KEEP_SHARE - rules.minimum_inference
        kept = rules.fp8_compute or not fits
        if rules.fp8_compute:
            step = "plain fp8 stays fp8, because this card multiplies it"
        elif kept:
            step = f"plain fp8 stays fp8, because {say_gib(wide)} in 16 bit would not fit this card"
        else:
            step = f"plain fp8 becomes 16 bit, twice the size, because {say_gib(wide)} fit this card"
        width = 1 if kept else rules.weight_bytes
    cast = "none" if width == rules.compute_bytes else "cast"
    return Choice(width, width, rules.compute_bytes, cast, kept, step, tuple(assumptions))


def _is_old(rules: LoadRules) -> bool:
    return rules.comfyui is not None and rules.comfyui < (0, 9, 0)


def _is_native(layer: Layer, rules: LoadRules) -> bool:
    if layer.full_precision:
        return False
    if layer.format in ("nvfp4", "mxfp8"):
        return rules.block_compute
    # int8 and 4-bit integers are multiplied as they are from compute capability 7.5 on (comfy-kitchen 0.2.31)
    return rules.fp8_compute if layer.format.startswith("float8") else layer.format != "unknown"


def _kept(tensor: TensorInfo, tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer], choice: Choice) -> Kept:
    """`tensor` as it lies on the card, and whether running its layer makes a copy of it."""
    layer, _, part = tensor.name.rpartition(".")
    if layer in layers and part == "weight":
        dequantised = choice.cast == "dequantise"
        return Kept(tensor.name, tensor.nbytes, logical_elements(tensor, tensors) if dequantised else 0)
    if layer in layers and part in SCALES:
        return Kept(tensor.name, tensor.nbytes)
    if ALWAYS_FP32.fullmatch(tensor.name):
        return Kept(tensor.name, 4 * tensor.elements)
    matrix = tensors.get(f"{layer}.weight")
    linear = bool(layers) and matrix is not None and len(matrix.shape) == 2 and not EMBEDDINGS.fullmatch(f"{layer}.weight")
    width = choice.linear if linear else choice.weight
    copied = choice.cast == "cast" and part == "weight" and width != choice.compute
    return Kept(tensor.name, width * tensor.elements, tensor.elements if copied else 0)


def _is_mark(tensor: TensorInfo, layers: Mapping[str, Layer]) -> bool:
    """It says something about the file and is no weight: the scales of a quantised layer stay, others are dropped."""
    layer, _, part = tensor.name.rpartition(".")
    if part in SCALES:
        return layer not in layers
    return bool(NOT_PARAMETER.fullmatch(tensor.name)) and part != "kernel"


def _bare(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The diffusion model's tensors under their own names; all tensors where it is none of WAN's."""
    found = identify_dit(checkpoint)
    prefix = found.prefix if found is not None else _prefix(checkpoint.tensors)
    if not prefix:
        return dict(checkpoint.tensors)
    return {
        (bare := name.removeprefix(prefix)): tensor._replace(name=bare)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


def _prefix(names: Iterable[str]) -> str:
    """What most of `names` begin with, of what may stand before a diffusion model's (comfy unet_prefix_from_state_dict)."""
    counted = list(names)
    return next((prefix for prefix in PREFIXES[:1] if sum(name.startswith(prefix) for name in counted) > 5), "")


def _majority(tensors: Iterable[TensorInfo]) -> str:
    """The type of most elements (comfy/utils.py weight_dtype)."""
    elements: dict[str, int] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return max(elements, key=lambda dtype: elements[dtype]) if elements else ""


def _is_float(tensor: TensorInfo) -> bool:
    return tensor.dtype in FLOAT_DTYPES or tensor.dtype in FP8_DTYPES


TOKENIZER_KEYS: Final = frozenset({"spiece_model", "tekken_model", "tokenizer_json"})
"""Tokenizers that travel inside a text encoder's file and never reach the card."""

EMBEDDINGS: Final = re.compile(
    r"(?:.*\.)?(?:shared|embed_tokens|relative_attention_bias|token_embedding|trainable_cond_mask|direction)\.weight"
)
"""Two-dimensional tensors that no Linear holds."""


# what other rooms ask


def is_quantised(checkpoint: Checkpoint) -> bool:
    """The file has layers that stay as stored: fp8_scaled, or ComfyUI's per-layer quantisation."""
    return bool(quantised_layers(_bare(checkpoint), checkpoint.metadata))


def diffusion_model_bytes(
    checkpoint: Checkpoint,
    *,
    weight_dtype: str = "default",
    compute_bytes: int = 2,
    fp8_compute: bool = False,
    card_total: int = 0,
    minimum_inference: int = 0,
) -> int:
    """Resident bytes of a diffusion model. `weight_dtype` is UNETLoader's option; sizes of the card in bytes."""
    rules = LoadRules(
        weight_bytes=compute_bytes,
        compute_bytes=compute_bytes,
        fp8_compute=fp8_compute,
        card_total=card_total,
        minimum_inference=minimum_inference,
    )
    return diffusion_model(checkpoint, weight_dtype=weight_dtype, rules=rules).resident


def text_encoder_bytes(checkpoint: Checkpoint) -> int:
    """Resident bytes of a text encoder."""
    return text_encoder(checkpoint).resident


def cast_bytes(checkpoint: Checkpoint, *, compute_bytes: int = 2) -> int:
    """Resident bytes of a model that is cast to one type whatever the file says: VAE, CLIP vision."""
    return _cast_whole(checkpoint, LoadRules(), compute_bytes).resident
