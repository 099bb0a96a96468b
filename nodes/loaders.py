"""VRAM-aware loader nodes for WAN: each loads through ComfyUI's own loader and registers what it loaded.

They take the inputs of the stock loaders by the same names, so that a stock loader can be swapped for ours in place.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from ..vram.components import ComponentRole
from .pack import Pack

logger = logging.getLogger("vram_headroom")

DEFAULT_PIPELINE = "wan"


class RegisteringLoader:
    """A stock loader that also registers. Subclasses name the stock node, the role, and where its file is."""

    pack: ClassVar[Pack]
    """Set once, when the pack connects to ComfyUI."""

    STOCK: ClassVar[str]
    ROLE: ClassVar[ComponentRole]
    FILE_INPUT: ClassVar[str]
    FOLDER: ClassVar[str]

    FUNCTION = "load"
    CATEGORY = "VRAM Headroom/loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        stock = cls.pack.host.files.stock_inputs(cls.STOCK)
        pipeline = (
            "STRING",
            {
                "default": DEFAULT_PIPELINE,
                "tooltip": "The models that make one video share a pipeline name: they are shown and placed together.",
            },
        )
        return {**stock, "optional": {**stock.get("optional", {}), "pipeline": pipeline}}

    def load(self, pipeline: str = DEFAULT_PIPELINE, **inputs: object) -> tuple[Any]:
        """Load as ComfyUI does, register, and hand on exactly what ComfyUI's loader gave."""
        loaded = self.pack.host.files.stock_load(self.STOCK, **inputs)
        try:
            self._register(pipeline.strip() or DEFAULT_PIPELINE, str(inputs[self.FILE_INPUT]), loaded)
        except Exception:
            # the model is loaded and works: that it is not shown by name must not cost the prompt
            logger.exception("%s is loaded but could not be registered", inputs.get(self.FILE_INPUT))
        return (loaded,)

    def _register(self, pipeline: str, file: str, loaded: Any) -> None:
        host = self.pack.host
        self.pack.offloader.register(
            pipeline=pipeline,
            name=file,
            role=self.ROLE,
            handle=host.models.handle(getattr(loaded, "patcher", loaded), host.files.path(self.FOLDER, file)),
            node_id=host.execution.current_node(),
        )


class LoadDiffusionModel(RegisteringLoader):
    STOCK = "UNETLoader"
    ROLE = ComponentRole.GENERATOR
    FILE_INPUT = "unet_name"
    FOLDER = "diffusion_models"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Loads a WAN diffusion model as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "unet", "vram", "load diffusion model"]


class LoadTextEncoder(RegisteringLoader):
    STOCK = "CLIPLoader"
    ROLE = ComponentRole.TEXT_ENCODER
    FILE_INPUT = "clip_name"
    FOLDER = "text_encoders"
    RETURN_TYPES = ("CLIP",)
    DESCRIPTION = "Loads WAN's text encoder (UMT5) as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "umt5", "clip", "vram", "load text encoder"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = super().INPUT_TYPES()
        choices = inputs["required"].get("type")
        if choices and "wan" in choices[0]:
            options = choices[1] if len(choices) > 1 else {}
            inputs["required"]["type"] = (choices[0], {**options, "default": "wan"})
        return inputs


class LoadVAE(RegisteringLoader):
    STOCK = "VAELoader"
    ROLE = ComponentRole.VAE
    FILE_INPUT = "vae_name"
    FOLDER = "vae"
    RETURN_TYPES = ("VAE",)
    DESCRIPTION = "Loads WAN's VAE as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "vae", "vram", "load vae"]


class LoadCLIPVision(RegisteringLoader):
    STOCK = "CLIPVisionLoader"
    ROLE = ComponentRole.CLIP_VISION
    FILE_INPUT = "clip_name"
    FOLDER = "clip_vision"
    RETURN_TYPES = ("CLIP_VISION",)
    DESCRIPTION = "Loads WAN 2.1's image encoder (CLIP vision) as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "clip vision", "vram", "image encoder"]


NODE_CLASSES: dict[str, type[RegisteringLoader]] = {
    "VRAMHeadroomLoadDiffusionModel": LoadDiffusionModel,
    "VRAMHeadroomLoadTextEncoder": LoadTextEncoder,
    "VRAMHeadroomLoadVAE": LoadVAE,
    "VRAMHeadroomLoadCLIPVision": LoadCLIPVision,
}
NODE_NAMES = {
    "VRAMHeadroomLoadDiffusionModel": "Load WAN Diffusion Model (VRAM Headroom)",
    "VRAMHeadroomLoadTextEncoder": "Load WAN Text Encoder (VRAM Headroom)",
    "VRAMHeadroomLoadVAE": "Load WAN VAE (VRAM Headroom)",
    "VRAMHeadroomLoadCLIPVision": "Load WAN CLIP Vision (VRAM Headroom)",
}
