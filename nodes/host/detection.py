"""ComfyUI's own answer for a model that is none of WAN's: which it is, and what it makes room for, from the header alone."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final

import comfy.model_management as model_management
import torch

from ...vram.estimate.checkpoint import Checkpoint, TensorInfo
from ...vram.estimate.detection import HostDetection

logger = logging.getLogger("vram_headroom")

KEPT: Final = 64
"""Files whose answer is kept; a person's graph names a handful."""

SHAPES: Final = ((1, 1, 64, 64), (2, 1, 64, 64), (1, 5, 96, 160), (1, 21, 60, 104), (3, 2, 17, 33))
"""Batch, latent frames, rows and columns at which ComfyUI's formula is asked: its answer must be proportional to the cells."""

TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
)
"""A header's names of types (safetensors README, Format) in torch. Any other counts as 16 bit: it is dequantised to that."""

STRIDES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "SC_Prior": (42, 1),
        "SC_B": (4, 1),
        "Flux2": (16, 1),
        "Mochi": (8, 6),
        "LTXV": (32, 8),
        "LTXAV": (32, 8),
        "HunyuanVideo": (8, 4),
        "Cosmos1CV8x8x8": (8, 8),
        "Wan21": (8, 4),
        "Wan22": (16, 4),
        "HunyuanImage21": (32, 1),
        "HunyuanVideo15": (16, 4),
        "ChromaRadiance": (1, 1),
    }
)
"""Pixels and frames of a latent cell by latent format, for ComfyUI before 0.16, whose formats do not say: the values of
`spacial_downscale_ratio` and `temporal_downscale_ratio` in 0.33 (comfy/latent_formats.py). Others are (8, 1), as there."""

READ_FROM_VALUES: Final = 1 << 16
"""One-dimensional tensors up to this many elements have values, all zero, without taking memory: detection of some families
reads one (comfy/model_detection.py, `allow_fp16` of Lumina 2), and a meta tensor has none to read."""


class HostDetector:
    """Asks ComfyUI once per file. Reads no weight, builds no layer, and never touches the card."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int, int], HostDetection | None] = OrderedDict()

    def detect(self, checkpoint: Checkpoint) -> HostDetection | None:
        """What ComfyUI says of this file; None, with one line in the log, if it can't say. Takes some milliseconds, once."""
        stamp = _stamp(checkpoint)
        with self._lock:
            if stamp in self._kept:
                self._kept.move_to_end(stamp)
                return self._kept[stamp]
        try:
            found = detect(checkpoint)
        except Exception as error:
            # ComfyUI's detection meets a file it was not made for, or has changed: either way there is no answer
            found = None
            name = os.path.basename(checkpoint.path)
            logger.info("ComfyUI can't say what %s needs (%s: %s)", name, type(error).__name__, _first_line(error))
        with self._lock:
            self._kept[stamp] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found


class UndetectedError(Exception):
    """ComfyUI gives no answer that can be used; the message says why."""


def detect(checkpoint: Checkpoint) -> HostDetection:
    """As HostDetector.detect, but asked anew. Raises UndetectedError, or whatever ComfyUI raises."""
    detection = importlib.import_module("comfy.model_detection")
    state = {name: _shaped(tensor) for name, tensor in checkpoint.tensors.items()}
    prefix = detection.unet_prefix_from_state_dict(state)
    # of a whole checkpoint the diffusion model alone; a bare file has no prefix, whatever is answered
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)} or state
    config = detection.model_config_from_unet(inner, "", metadata=dict(checkpoint.metadata))
    if config is None:
        raise UndetectedError("it knows no such model")
    parameters = sum(tensor.numel() for tensor in inner.values())
    dtype, cast = _dtypes(config, inner, parameters)
    model = _without_weights(config, inner, dtype, cast)
    latent = model.latent_format
    dimensions = int(latent.latent_dimensions)
    if dimensions not in (2, 3):
        raise UndetectedError(f"its latents have {dimensions} dimension, not those of an image or a video")
    spatial, temporal = _strides(latent)
    return HostDetection(
        name=type(config).__name__,
        bytes_per_cell=_per_cell(model, int(latent.latent_channels), dimensions),
        latent_channels=int(latent.latent_channels),
        spatial_stride=spatial,
        temporal_stride=temporal if dimensions == 3 else None,
        parameters=parameters,
    )


def _stamp(checkpoint: Checkpoint) -> tuple[str, int, int]:
    try:
        changed = os.stat(checkpoint.path).st_mtime_ns
    except (OSError, ValueError):
        changed = 0
    return checkpoint.path, checkpoint.file_bytes, changed


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _shaped(tensor: TensorInfo) -> torch.Tensor:
    """A tensor of that shape and type that takes no memory."""
    dtype = TORCH_DTYPES.get(tensor.dtype, torch.float16)
    if len(tensor.shape) == 1 and tensor.shape[0] <= READ_FROM_VALUES:
        return torch.zeros((1,), dtype=dtype).expand(tensor.shape)
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _dtypes(config: Any, state: Mapping[str, torch.Tensor], parameters: int) -> tuple[torch.dtype, torch.dtype | None]:
    """The types ComfyUI would keep weights in and compute in, asked for as comfy/sd.py load_diffusion_model_state_dict does."""
    supported = list(config.supported_inference_dtypes)
    weight_dtype = importlib.import_module("comfy.utils").weight_dtype(state)
    dtype = model_management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=weight_dtype)
    return dtype, model_management.unet_manual_cast(dtype, model_management.get_torch_device(), supported)


def _without_weights(config: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype, cast: torch.dtype | None) -> Any:
    """The model class that ComfyUI would make of this file, holding no layers: its formula looks at none."""
    config.set_inference_dtype(dtype, cast)
    config.unet_config["disable_unet_model_creation"] = True
    model = config.get_model(state, "", device=torch.device("meta"))
    if getattr(model, "diffusion_model", None) is None:
        # all that the formula asks of the layers
        model.diffusion_model = SimpleNamespace(dtype=dtype)
    return model


def _strides(latent: Any) -> tuple[int, int]:
    """Pixels and frames of one latent cell."""
    known = STRIDES.get(type(latent).__name__, (8, 1))
    return (
        int(getattr(latent, "spacial_downscale_ratio", known[0])),
        int(getattr(latent, "temporal_downscale_ratio", known[1])),
    )


def _per_cell(model: Any, channels: int, dimensions: int) -> float:
    """Bytes per latent cell by ComfyUI's formula. Raises UndetectedError if it is not proportional to their number."""
    found: list[float] = []
    for batch, frames, rows, columns in SHAPES:
        shape = [batch, channels, frames, rows, columns] if dimensions == 3 else [batch * frames, channels, rows, columns]
        found.append(float(model.memory_required(shape)) / (batch * frames * rows * columns))
    first = found[0]
    if not (math.isfinite(first) and first > 0):
        raise UndetectedError(f"its formula says {first} bytes per latent cell")
    if any(not math.isclose(first, other, rel_tol=1e-6) for other in found):
        raise UndetectedError("what it makes room for is not proportional to the size of the latent")
    return first
