"""Latents: empty ones, and to and from pixels and files."""

import hashlib
import json
import os
import struct
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from . import node

Latent = dict[str, Any]


@node("EmptyHunyuanLatentVideo")
def empty_video(width: int, height: int, length: int, batch_size: int = 1) -> tuple[Latent]:
    return ({"samples": torch.zeros(batch_size, 16, (length - 1) // 4 + 1, height // 8, width // 8)},)


@node("Wan22ImageToVideoLatent")
def wan22_image_to_video(
    vae: comfy.sd.VAE,
    width: int,
    height: int,
    length: int,
    batch_size: int,
    start_image: torch.Tensor | None = None,
) -> tuple[Latent]:
    latent = torch.zeros(1, 48, (length - 1) // 4 + 1, height // 16, width // 16)
    if start_image is not None:
        first = vae.encode(start_image[:1])
        latent[:, :, : first.shape[2]] = first[..., : latent.shape[3], : latent.shape[4]]
    return ({"samples": latent.repeat(batch_size, 1, 1, 1, 1)},)


def _frames(pixels: torch.Tensor) -> torch.Tensor:
    """(batch, frames, height, width, 3) to one list of frames."""
    return pixels.reshape(-1, *pixels.shape[-3:])


@node("VAEDecode", "decode")
def decode(vae: comfy.sd.VAE, samples: Latent) -> tuple[torch.Tensor]:
    return (_frames(vae.decode(samples["samples"])),)


@node("VAEDecodeTiled", "decode")
def decode_tiled(
    vae: comfy.sd.VAE,
    samples: Latent,
    tile_size: int,
    overlap: int = 64,
    temporal_size: int = 64,
    temporal_overlap: int = 8,
) -> tuple[torch.Tensor]:
    tile = tile_size // vae.spacial_compression_decode()
    frames = max(2, temporal_size // vae.temporal_compression_decode())
    return (_frames(vae.decode_tiled(samples["samples"], tile_x=tile, tile_y=tile, tile_t=frames)),)


@node("VAEEncode", "encode")
def encode(vae: comfy.sd.VAE, pixels: torch.Tensor) -> tuple[Latent]:
    return ({"samples": vae.encode(pixels)},)


@node("VAEEncodeTiled", "encode")
def encode_tiled(
    vae: comfy.sd.VAE,
    pixels: torch.Tensor,
    tile_size: int,
    overlap: int,
    temporal_size: int = 64,
    temporal_overlap: int = 8,
) -> tuple[Latent]:
    return ({"samples": vae.encode_tiled(pixels, tile_x=tile_size, tile_y=tile_size)},)


@node("SaveLatent", "save")
def save_latent(
    samples: Latent, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
) -> dict[str, Any]:
    folder, name, number, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
    file = f"{name}_{number:05}_.latent"
    tensors = {"latent_tensor": samples["samples"], "latent_format_version_0": torch.tensor([])}
    comfy.utils.save_torch_file(tensors, os.path.join(folder, file))
    return {"ui": {"latents": [{"filename": file, "subfolder": subfolder, "type": "output"}]}, "result": (samples,)}


def _changed(cls: type, latent: str) -> str:
    with open(folder_paths.get_annotated_filepath(latent), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _valid(cls: type, latent: str) -> bool | str:
    return True if folder_paths.exists_annotated_filepath(latent) else f"Invalid latent file: {latent}"


@node("LoadLatent", "load", IS_CHANGED=_changed, VALIDATE_INPUTS=_valid)
def load_latent(latent: str) -> tuple[Latent]:
    with open(folder_paths.get_annotated_filepath(latent), "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))["latent_tensor"]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        data = bytearray(file.read(end - start))
    return ({"samples": torch.frombuffer(data, dtype=torch.float32).reshape(entry["shape"])},)
