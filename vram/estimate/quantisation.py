"""How a file stores its weights: which layers are quantised, in which format, with which scales, and what GGUF's types cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

from .checkpoint import TensorInfo

Format = Literal[
    "float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8", "unknown"
]
"""ComfyUI's names (comfy/quant_ops.py QUANT_ALGOS, 0.33; 0.8 knows the first three and refuses the others)."""

FORMATS_OF_0_8: Final = frozenset({"float8_e4m3fn", "float8_e5m2", "nvfp4"})
"""ComfyUI 0.8, comfy/quant_ops.py QUANT_ALGOS."""

FLOAT_DTYPES: Final = frozenset({"F16", "BF16", "F32", "F64"})
FP8_DTYPES: Final = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})
"""What ComfyUI takes for fp8 (comfy/model_management.py get_supported_float8_types)."""

SCALES: Final = (
    *("scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"),
    *("weight_s_rel", "weight_s_channel", "weight_codebook"),
)
"""Tensors beside a quantised weight that stay as stored (comfy/ops.py _load_quantized_module, 0.33; comfy/utils.py
convert_old_quants renames the first two)."""

FULL_PRECISION_MARKS: Final = 2
"""Elements of `scaled_fp8` that say: multiply in 16 bit (comfy/utils.py convert_old_quants)."""

CONVROT_GROUP: Final = 256
"""Weights rotated together where the file says nothing else (comfy/ops.py _load_quantized_module)."""

W4A8_GROUP: Final = 16
"""Weights that share a scale where the file says nothing else (comfy/ops.py _load_quantized_module)."""


class Layer(NamedTuple):
    """One quantised layer."""

    format: Format
    mark_bytes: int
    """The JSON that ComfyUI keeps with it and counts as weights (comfy/ops.py _quantized_weight_state_dict)."""
    full_precision: bool
    """It is multiplied in 16 bit whatever the card can."""


def quantised_layers(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, Layer]:
    """The quantised layers among `tensors`, whose names have no prefix, by the marks ComfyUI goes by; scales alone are none."""
    layers: dict[str, Layer] = {}
    described = _described(metadata)
    marks = tensors.get("scaled_fp8")
    if described is not None:
        for name, conf in described.items():
            layers[name] = _from_conf(conf)
    elif marks is not None:
        full = marks.elements == FULL_PRECISION_MARKS
        mark = len(_mark("float8_e4m3fn", full_precision_matrix_mult=True) if full else _mark("float8_e4m3fn"))
        for name in tensors:
            if name.endswith(".scale_weight"):
                layers[name.removesuffix(".scale_weight")] = Layer("float8_e4m3fn", mark, full)
    for name, tensor in tensors.items():
        layer = name.removesuffix(".comfy_quant")
        if layer != name and layer not in layers:
            layers[layer] = _from_mark(tensor.nbytes, _format(layer, tensors))
    return {name: layer for name, layer in layers.items() if _is_matrix(tensors.get(f"{name}.weight"))}


def _is_matrix(weight: TensorInfo | None) -> bool:
    return weight is not None and len(weight.shape) == 2


def _described(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Layers that the file's metadata describes; None if it does not speak of quantisation."""
    text = metadata.get("_quantization_metadata")
    if text is None:
        return None
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}  # ComfyUI refuses such a file
    return layers if isinstance(layers, dict) else {}


def _mark(form: str, **more: object) -> str:
    return json.dumps({"format": form, **more})


def _from_conf(conf: Any) -> Layer:
    conf = conf if isinstance(conf, dict) else {}
    form = _FORMATS.get(str(conf.get("format")), "unknown")
    full = bool(conf.get("full_precision_matrix_mult", False))
    more: dict[str, object] = {"full_precision_matrix_mult": True} if full else {}
    rotated = {"convrot_groupsize": conf.get("convrot_groupsize", CONVROT_GROUP)}
    if form == "int8_tensorwise" and conf.get("convrot"):
        more |= {"convrot": True, **rotated}
    if form == "convrot_w4a4":
        more |= rotated
    if form == "asym_w4a8_int8":
        more |= {"group_size": conf.get("group_size", W4A8_GROUP), **rotated}
    return Layer(form, len(_mark(form, **more)), full)


def _from_mark(nbytes: int, form: Format) -> Layer:
    """A layer whose JSON has `nbytes`: its text is a weight, which is never read, so the likeliest of that length is taken."""
    likely = [{"format": form}, {"format": form, "full_precision_matrix_mult": True}, {"format": form, "convrot": True}]
    return min(map(_from_conf, likely), key=lambda layer: abs(layer.mark_bytes - nbytes))


_FORMATS: Final[Mapping[str, Format]] = {name: name for name in get_args(Format)}


def _format(layer: str, tensors: Mapping[str, TensorInfo]) -> Format:
    """By the types and shapes of a layer's weight and scales."""
    weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
    if weight is None:
        return "unknown"
    if f"{layer}.weight_scale_2" in tensors:
        return "nvfp4"
    if f"{layer}.weight_s_rel" in tensors:
        return "asym_w4a8_int8"
    blocks = scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1
    if weight.dtype == "F8_E5M2":
        return "float8_e5m2"
    if weight.dtype == "F8_E4M3":
        return "mxfp8" if blocks else "float8_e4m3fn"
    if weight.dtype == "I8":
        return "convrot_w4a4" if blocks else "int8_tensorwise"
    return "unknown"


GGUF_AS_TORCH: Final = frozenset({"F32", "F16"})
"""Types that ComfyUI-GGUF loads as ordinary tensors; all others, BF16 too, stay packed (its ops.py and loader.py)."""

GGUF_DEQUANTISE: Final[Mapping[str, float]] = {
    "BF16": 6.0,
    "Q8_0": 2.0,
    "Q4_0": 3.0,
    "Q6_K": 5.13,
    "Q4_K": 5.19,
    "Q2_K": 5.25,
    "Q3_K": 5.31,
    "Q5_K": 7.19,
    "Q5_0": 10.0,
}
"""Bytes per weight above the packed ones while a layer is unpacked to 16 bit: ComfyUI-GGUF's dequant.py, traced on torch 2.13.
BF16 derived: two 4-byte integers' worth of shifting and the result share the moment."""

GGUF_DEQUANTISE_UNKNOWN: Final = 10.0
"""For the types that were not traced (Q4_1, Q5_1, IQ...): the worst of those that were."""
