"""Text encoder, VAE and diffusion model objects as nodes hand them around, on tiny models with real books."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from standin import peaks
from standin.card import Booked, on_card
from standin.faults import faults
from standin.models import WAN21, ModelFile, WanTEModel, WanVAE, build
from standin.streaming import forward

from . import model_management, model_patcher
from .model_patcher import ModelPatcher


class CLIPType(Enum):
    STABLE_DIFFUSION = 1
    WAN = 13


class CLIP:
    def __init__(
        self,
        model: WanTEModel | None = None,
        model_options: dict[str, Any] | None = None,
        disable_dynamic: bool = False,
    ) -> None:
        if model is None:
            return
        options = model_options or {}
        load_device = options.get("load_device", model_management.text_encoder_device())
        offload_device = options.get("offload_device", model_management.text_encoder_offload_device())
        self.cond_stage_model = model
        model.dtype = torch.float16 if on_card(load_device) else torch.float32
        kind = _patcher_class(disable_dynamic)
        self.patcher = kind(model, load_device=load_device, offload_device=offload_device)
        self.patcher.is_clip = True
        size = self.patcher.model_size()
        if model_management.text_encoder_initial_device(load_device, offload_device, size) == load_device:
            model_management.load_models_gpu([self.patcher], force_full_load=True)
        self.layer_idx: int | None = None

    def clone(self, disable_dynamic: bool = False) -> CLIP:
        other = CLIP()
        other.patcher = self.patcher.clone(disable_dynamic=disable_dynamic)
        other.cond_stage_model = self.cond_stage_model
        other.layer_idx = self.layer_idx
        return other

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list[int]:
        return [*text.encode()[:511], 1]

    def load_model(self, tokens: Any = None) -> ModelPatcher:
        model_management.load_models_gpu([self.patcher], memory_required=0)
        return self.patcher

    def encode_from_tokens(self, tokens: list[int], return_pooled: bool = False, return_dict: bool = False) -> Any:
        self.load_model(tokens)
        activations = Booked(peaks.UMT5_BYTES, "text encoder activations", self.patcher.load_device)
        with activations, forward(self.patcher):
            faults.reach("text encoder")
            cond = self.cond_stage_model.encode_token_weights(tokens)
            faults.reach("text encoder", after=True)
        if return_dict:
            return {"cond": cond, "pooled_output": None}
        return (cond, None) if return_pooled else cond

    def encode_from_tokens_scheduled(self, tokens: list[int], **kwargs: Any) -> list[list[Any]]:
        encoded = self.encode_from_tokens(tokens, return_dict=True)
        cond = encoded.pop("cond")
        return [[cond, encoded]]


class VAE:
    def __init__(
        self,
        model: WanVAE,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        disable_dynamic: bool = False,
    ) -> None:
        self.first_stage_model = model
        self.device = model_management.vae_device() if device is None else device
        self.output_device = model_management.intermediate_device()
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.vae_dtype = dtype or model_management.vae_dtype(self.device, self.working_dtypes)
        self.latent_channels = model.channels
        self.latent_dim = 3
        self.disable_offload = False
        self.size: int | None = None
        self.patcher = _patcher_class(disable_dynamic)(model, self.device, model_management.vae_offload_device())

    def model_size(self) -> int:
        self.size = self.patcher.model_size()
        return self.size

    def throw_exception_if_invalid(self) -> None: ...

    def spacial_compression_decode(self) -> int:
        return self.first_stage_model.stride

    def spacial_compression_encode(self) -> int:
        return self.first_stage_model.stride

    def temporal_compression_decode(self) -> int:
        return 4

    def memory_used_decode(self, shape: Any, dtype: torch.dtype) -> int:
        """ComfyUI's formula for a latent shape (0.33, sd.py): frames beyond the fourth do not matter."""
        size = model_management.dtype_size(dtype)
        if self.first_stage_model.is_22:
            return 8000 * shape[3] * shape[4] * 256 * size
        return (2200 if shape[2] <= 4 else 7000) * shape[3] * shape[4] * 64 * size

    def memory_used_encode(self, shape: Any, dtype: torch.dtype) -> int:
        size = model_management.dtype_size(dtype)
        if self.first_stage_model.is_22:
            return 3300 * shape[3] * shape[4] * size
        return (1500 if shape[2] <= 4 else 6000) * shape[3] * shape[4] * size

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        memory_used = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        with _tiled_instead() as out_of_memory:
            self._load(memory_used)
            with Booked(self._decode_peak(samples_in.shape), "VAE decode", self.device), forward(self.patcher, _decodes):
                faults.reach("decode")
                pixels = self._pixels(samples_in)
                faults.reach("decode", after=True)
                return pixels
        if out_of_memory:
            logging.warning("Warning: Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding.")
        return self._decode_in_tiles_that_fit(samples_in, memory_used)

    def _decode_in_tiles_that_fit(self, samples: torch.Tensor, memory_used: int) -> torch.Tensor:
        """Tiles of 256 pixels, fewer frames until one fits the budget, then as wide as the budget allows."""
        budget = min(memory_used, int(model_management.get_total_memory(self.device) * 0.8))
        self._load(budget)
        tile, frames = 256 // self.spacial_compression_decode(), samples.shape[2]

        def cost(frames: int, tile: int) -> int:
            return self.memory_used_decode(_bounded(samples.shape, tile, tile, frames), self.vae_dtype)

        while frames > 2 and cost(frames, tile) > budget:
            frames = -(-frames // 2)
        while tile * 2 <= max(samples.shape[3:]) and cost(frames, tile * 2) <= budget:
            tile *= 2
        return self.decode_tiled_3d(samples, tile_t=frames, tile_x=tile, tile_y=tile, overlap=(1, tile // 4, tile // 4))

    def decode_tiled_3d(
        self,
        samples: torch.Tensor,
        tile_t: int = 999,
        tile_x: int = 32,
        tile_y: int = 32,
        overlap: tuple[int, int, int] = (1, 8, 8),
    ) -> torch.Tensor:
        """In tiles of so many cells: one at a time is on the card."""
        peak = self._decode_peak(_bounded(samples.shape, tile_x, tile_y, tile_t))
        with Booked(peak, "VAE decode, one tile", self.device), forward(self.patcher, _decodes):
            faults.reach("decode tile")
            pixels = self._pixels(samples)
            faults.reach("decode tile", after=True)
            return pixels

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        cost = self.memory_used_decode(_bounded(samples.shape, tile_x, tile_y, tile_t), self.vae_dtype)
        self._load(cost)
        frames, height, width = samples.shape[2:]
        return self.decode_tiled_3d(samples, tile_t or frames, tile_x or width, tile_y or height)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """(frames, height, width, 3) to (1, channels, latent frames, h, w)."""
        stride = self.spacial_compression_encode()
        height, width = (size // stride * stride for size in pixel_samples.shape[1:3])
        pixels = pixel_samples[:, :height, :width, :3].permute(3, 0, 1, 2)[None].float()
        memory_used = self.memory_used_encode(pixels.shape, self.vae_dtype)
        with _tiled_instead() as out_of_memory:
            self._load(memory_used)
            with Booked(self._encode_peak(pixels.shape), "VAE encode", self.device), forward(self.patcher, _encodes):
                faults.reach("encode")
                latent = self.first_stage_model.encode(pixels)
                faults.reach("encode", after=True)
                return latent
        if out_of_memory:
            logging.warning("Warning: Ran out of memory when regular VAE encoding, retrying with tiled VAE encoding.")
        return self.encode_tiled_3d(pixels, tile_x=256, tile_y=256, overlap=(1, 64, 64))

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        pixels = pixel_samples[..., :3].permute(3, 0, 1, 2)[None].float()
        self._load(self.memory_used_encode((1, 3, pixels.shape[2], tile_y or 512, tile_x or 512), self.vae_dtype))
        return self.encode_tiled_3d(pixels, tile_t or 9999, tile_x or 512, tile_y or 512)

    def encode_tiled_3d(
        self,
        samples: torch.Tensor,
        tile_t: int = 9999,
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: tuple[int, int, int] = (1, 64, 64),
    ) -> torch.Tensor:
        """In tiles of so many pixels: one at a time is on the card."""
        frames, height, width = samples.shape[2:]
        peak = self._encode_peak((1, 3, min(frames, tile_t), min(height, tile_y), min(width, tile_x)))
        with Booked(peak, "VAE encode, one tile", self.device), forward(self.patcher, _encodes):
            faults.reach("encode tile")
            latent = self.first_stage_model.encode(samples)
            faults.reach("encode tile", after=True)
            return latent

    def _decode_peak(self, shape: Any) -> int:
        """Of a latent shape."""
        frames, stride = 4 * (shape[2] - 1) + 1, self.first_stage_model.stride
        is_22 = self.first_stage_model.is_22
        return peaks.vae_peak("decode", is_22, shape[4] * stride, shape[3] * stride, frames, self._element_bytes())

    def _encode_peak(self, shape: Any) -> int:
        """Of a shape in pixels."""
        is_22 = self.first_stage_model.is_22
        return peaks.vae_peak("encode", is_22, shape[4], shape[3], shape[2], self._element_bytes())

    def _element_bytes(self) -> int:
        return model_management.dtype_size(self.vae_dtype)

    def _load(self, memory_required: int) -> None:
        model_management.load_models_gpu([self.patcher], memory_required, force_full_load=self.disable_offload)

    def _pixels(self, samples: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.decode(samples.float()).movedim(1, -1)


@contextmanager
def _tiled_instead() -> Iterator[list[BaseException]]:
    """Swallows an out-of-memory error, so that what follows the block can try it with less."""
    errors: list[BaseException] = []
    try:
        yield errors
    except Exception as error:
        model_management.raise_non_oom(error)
        errors.append(error.with_traceback(None))


def _bounded(shape: Any, tile_x: int | None, tile_y: int | None, tile_t: int | None) -> tuple[int, ...]:
    frames, height, width = shape[2:]
    return (
        *shape[:2],
        min(frames, tile_t or frames),
        min(height, tile_y or height),
        min(width, tile_x or width),
    )


def _patcher_class(disable_dynamic: bool) -> type[ModelPatcher]:
    return ModelPatcher if disable_dynamic else model_patcher.CoreModelPatcher


def _decodes(layer: str) -> bool:
    return not layer.startswith(("encoder.", "conv1"))


def _encodes(layer: str) -> bool:
    return not layer.startswith(("decoder.", "conv2"))


def load_diffusion_model(
    unet_path: str,
    model_options: dict[str, Any] = {},  # noqa: B006
    disable_dynamic: bool = False,
) -> ModelPatcher:
    file = ModelFile(unet_path)
    if not file.is_diffusion_model:
        raise RuntimeError(f"ERROR: Could not detect model type of: {unet_path}")
    device = model_management.get_torch_device()
    model: WAN21 = build(WAN21, file)
    model.dtype = model_management.unet_dtype(device)
    patcher = _patcher_class(disable_dynamic)(model, device, model_management.unet_offload_device())
    patcher.cached_patcher_init = (load_diffusion_model, (unet_path, model_options))
    return patcher


def load_clip(
    ckpt_paths: list[str],
    embedding_directory: Any = None,
    clip_type: CLIPType = CLIPType.STABLE_DIFFUSION,
    model_options: dict[str, Any] = {},  # noqa: B006
    disable_dynamic: bool = False,
) -> CLIP:
    file = ModelFile(ckpt_paths[0])
    if not file.is_text_encoder:
        raise RuntimeError(f"ERROR: the stand-in knows only UMT5 text encoders, and {file.name} is none")
    clip = CLIP(build(WanTEModel, file), model_options, disable_dynamic)
    clip.patcher.cached_patcher_init = (
        load_clip_model_patcher,
        (ckpt_paths, embedding_directory, clip_type, model_options),
    )
    return clip


def load_clip_model_patcher(
    ckpt_paths: list[str],
    embedding_directory: Any = None,
    clip_type: CLIPType = CLIPType.STABLE_DIFFUSION,
    model_options: dict[str, Any] = {},  # noqa: B006
    disable_dynamic: bool = False,
) -> ModelPatcher:
    return load_clip(ckpt_paths, embedding_directory, clip_type, model_options, disable_dynamic).patcher


def load_vae(vae_path: str, disable_dynamic: bool = False) -> VAE:
    file = ModelFile(vae_path)
    if not file.is_vae:
        raise RuntimeError("ERROR: VAE is invalid: None")
    vae = VAE(build(WanVAE, file), disable_dynamic=disable_dynamic)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (vae_path, None, None))
    return vae


def load_vae_patcher(vae_path: str, metadata: Any, device: Any, disable_dynamic: bool = False) -> ModelPatcher:
    return load_vae(vae_path, disable_dynamic).patcher
