"""From single tensors as they lie on the card to a model's footprint: its layers, the copies they need to run, LoRAs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from .architecture import logical_elements
from .checkpoint import TensorInfo
from .estimate import Term
from .loading import Cast, Footprint, LoadRules, Module
from .quantisation import FP8_DTYPES

ALWAYS_FP32: Final = re.compile(
    r"(?:vace_)?patch_embedding(?:_pose|_mask|_global)?\.(?:weight|bias)"
    r"|motion_encoder\.enc\.net_app\.convs\.(?:0\.1|.*\.conv[12]\.[12])\.bias|motion_encoder\..*\.kernel"
    r"|(?:vision_model\.)?(?:pre_layrnorm|post_layernorm)\.(?:weight|bias)|visual_projection\.weight"
)
"""What its class builds in fp32 whatever type is asked for: patch embeddings (comfy/ldm/wan/model.py), the motion
encoder's biases and blur (model_animate.py), and norms and projection of CLIP vision (comfy/clip_model.py). Read off the
classes of 0.33."""

LORA_ON_THE_FLY: Final = 4
"""Bytes per weight above its 16-bit copy while a LoRA is added to a weight that streams: the product and its scaled copy in the
compute type (comfy/lora.py calculate_weight through LowVramPatch; traced on 0.8 and 0.33, 6 with the copy itself)."""

LORA_PATCHING: Final = 10
"""Bytes per weight above the result while a LoRA is merged into an fp16 weight: the product and its scaled copy in fp32, and
that in fp16 (comfy/model_patcher.py patch_weight_to_device; traced on 0.8 and 0.33, 12 with the result). ComfyUI-GGUF takes it
in every forward, above the unpacked weight."""

LORA_PATCHING_QUANTISED: Final = 15
"""The same into fp8, plain or scaled: dequantised, patched, rounded back (traced on 0.8 and 0.33, 16 with the result)."""


class Kept(NamedTuple):
    """One tensor as it lies on the card."""

    name: str
    bytes: int
    elements: int = 0
    """Weights it stands for, where its layer makes a copy of it to run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How ComfyUI decides to keep a file."""

    weight: int
    """Bytes of an element."""
    linear: int
    """Bytes of an element of matrices and their biases that are not quantised, in a file where others are."""
    compute: int
    cast: Cast
    kept_fp8: bool | None = None
    step: str | None = None
    assumptions: tuple[str, ...] = ()
    integer_bits: int | None = None


def footprint_of(
    kept: list[Kept],
    tensors: Mapping[str, TensorInfo],
    rules: LoadRules,
    patched: bool,
    constant: int,
    choice: Choice,
    *,
    fp32_apart: bool = True,
) -> Footprint:
    """Everything about a model whose tensors lie on the card as `kept` says."""
    resident = constant + sum(tensor.bytes for tensor in kept)
    copies = choice.compute if fp32_apart else 0
    manual = choice.compute if choice.cast != "none" or any(tensor.elements for tensor in kept) else 0
    modules = _modules(kept, tensors, manual, patched)
    block = [tensor.elements for tensor in kept if BLOCK.match(tensor.name)] or [tensor.elements for tensor in kept]
    matrices = [tensor.elements for tensor in tensors.values() if len(tensor.shape) == 2 and BLOCK.match(tensor.name)]
    largest = max(matrices, default=0) if patched else 0
    ahead = sorted((module.bytes for module in modules), reverse=True)[: max(1, rules.streams)]
    quantised = choice.cast != "none"
    transient = max(block, default=0) * copies
    name = "the block's largest weight, unpacked" if choice.cast == "dequantise" else "the block's largest weight in 16 bit"
    return Footprint(
        resident=resident,
        booked=resident,
        staged_bytes=constant + sum(tensors[tensor.name].nbytes for tensor in kept if tensor.name in tensors),
        largest_layer=max((module.bytes for module in modules), default=0),
        cast=choice.cast,
        kept_fp8=choice.kept_fp8,
        transients=terms((name, transient)),
        streaming=terms(
            ("layers on their way", sum(ahead)),
            ("LoRAs added to a layer on its way", largest * LORA_ON_THE_FLY),
        ),
        patching=terms(
            ("LoRAs merged into the largest weight", largest * (LORA_PATCHING_QUANTISED if quantised else LORA_PATCHING))
        ),
        modules=modules,
        integer_bits=choice.integer_bits,
        step=choice.step,
        assumptions=choice.assumptions,
    )


BLOCK: Final = re.compile(r".*blocks?\.\d+\.")


def terms(*terms: tuple[str, int]) -> tuple[Term, ...]:
    return tuple(Term(name, nbytes) for name, nbytes in terms if nbytes)


def _modules(kept: Iterable[Kept], tensors: Mapping[str, TensorInfo], compute: int, patched: bool) -> tuple[Module, ...]:
    """The layers, in the order of ModelPatcher.load: those that cost most to leave off the card first.

    `compute`: bytes of an element in the type weights are cast to, 0 where none is. A LoRA is taken to change every matrix.
    """
    sizes: dict[str, int] = {}
    extra: dict[str, int] = {}
    for tensor in kept:
        layer, _, part = tensor.name.rpartition(".")
        sizes[layer] = sizes.get(layer, 0) + tensor.bytes
        info = tensors.get(tensor.name)
        if part not in ("weight", "bias") or info is None:
            continue
        elements = logical_elements(info, tensors)
        if patched and part == "weight" and len(info.shape) == 2:
            extra[layer] = extra.get(layer, 0) + 2 * elements * (compute or tensor.bytes // max(1, elements))
        elif compute and tensor.bytes != elements * compute:
            extra[layer] = extra.get(layer, 0) + elements * compute
    parents = {name[:end] for name in sizes for end in range(len(name)) if name[end] == "."}
    modules = [Module(name, size, size + extra.get(name, 0)) for name, size in sizes.items() if name and name not in parents]
    return tuple(sorted(modules, key=lambda module: (module.offload_bytes, module.bytes, module.name), reverse=True))


def element_bytes(tensor: TensorInfo) -> int:
    """Bytes of one element of a type that holds whole bytes."""
    return {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(tensor.dtype, 1 if tensor.dtype in FP8_DTYPES else 2)
