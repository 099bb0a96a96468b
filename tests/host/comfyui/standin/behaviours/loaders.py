"""Loaders: the same names, folders and delegates as ComfyUI's."""

from typing import Any

import comfy.clip_vision
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from . import node

FP8 = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@node("UNETLoader", "load_unet")
def load_unet(unet_name: str, weight_dtype: str) -> tuple[ModelPatcher]:
    options: dict[str, Any] = {"dtype": FP8[weight_dtype]} if weight_dtype in FP8 else {}
    if weight_dtype == "fp8_e4m3fn_fast":
        options["fp8_optimizations"] = True
    path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
    return (comfy.sd.load_diffusion_model(path, model_options=options),)


@node("CLIPLoader", "load_clip")
def load_clip(clip_name: str, type: str = "stable_diffusion", device: str = "default") -> tuple[comfy.sd.CLIP]:
    kind = getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
    embeddings = folder_paths.get_folder_paths("embeddings")
    return (comfy.sd.load_clip([path], embedding_directory=embeddings, clip_type=kind, model_options=options),)


def vae_list(s: Any) -> list[str]:
    """Called as `VAELoader.vae_list(VAELoader)` by other packs."""
    return [*folder_paths.get_filename_list("vae"), "pixel_space"]


@node("VAELoader", "load_vae", vae_list=staticmethod(vae_list))
def load_vae(vae_name: str) -> tuple[comfy.sd.VAE]:
    return (comfy.sd.load_vae(folder_paths.get_full_path_or_raise("vae", vae_name)),)


@node("CLIPVisionLoader", "load_clip")
def load_clip_vision(clip_name: str) -> tuple[comfy.clip_vision.ClipVisionModel]:
    model = comfy.clip_vision.load(folder_paths.get_full_path_or_raise("clip_vision", clip_name))
    if model is None:
        raise RuntimeError("ERROR: clip vision file is invalid and does not contain a valid vision model.")
    return (model,)


@node("CheckpointLoaderSimple", "load_checkpoint")
def load_checkpoint(ckpt_name: str) -> tuple[Any, Any, Any]:
    path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
    return comfy.sd.load_diffusion_model(path), None, None


@node("LoraLoaderModelOnly", "load_lora_model_only")
def load_lora_model_only(model: ModelPatcher, lora_name: str, strength_model: float) -> tuple[ModelPatcher]:
    folder_paths.get_full_path_or_raise("loras", lora_name)
    if strength_model == 0:
        return (model,)
    patched = model.clone()
    patched.add_patches({f"lora:{lora_name}": lora_name}, strength_model)
    return (patched,)


@node("LoraLoader", "load_lora")
def load_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP, lora_name: str, strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP]:
    (patched,) = load_lora_model_only(model, lora_name, strength_model)
    return patched, clip.clone()
