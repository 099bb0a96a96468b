"""VRAM-aware loader nodes for WAN: each loads through ComfyUI's own loader and registers what it loaded.

They take the inputs of the stock loaders by the same names, so that a stock loader can be swapped for ours in place.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Final

from ..vram.components import ComponentRole
from ..vram.estimate.architecture import UNKNOWN, Architecture, ModelKind, identify
from ..vram.plan.types import MissingFileError
from ..vram.policy import hosted_policy
from .host.files import Wanted
from .pack import Pack

logger = logging.getLogger("vram_headroom")

DEFAULT_PIPELINE: Final = "wan"
CATEGORY: Final = "VRAM Headroom/loaders"
NOTHING: Final = "none"

PIPELINE_INPUT: Final = (
    "STRING",
    {
        "default": DEFAULT_PIPELINE,
        "tooltip": "The models that make one video share a pipeline name: they are shown and placed together.",
    },
)


class RegisteringLoader:
    """A stock loader that also registers. Subclasses name the stock node, the role, where its file is and what it must hold."""

    pack: ClassVar[Pack]
    """Set once, when the pack connects to ComfyUI."""

    STOCK: ClassVar[str]
    ROLE: ClassVar[ComponentRole]
    FILE_INPUT: ClassVar[str]
    FOLDER: ClassVar[str]
    HOLDS: ClassVar[ModelKind]
    WANTED: ClassVar[str]
    """What it must hold, for a person."""

    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        stock = cls.pack.host.files.stock_inputs(cls.STOCK)
        return {**stock, "optional": {**stock.get("optional", {}), "pipeline": PIPELINE_INPUT}}

    def load(self, pipeline: str = DEFAULT_PIPELINE, **inputs: object) -> tuple[Any]:
        """Load as ComfyUI does, register, and hand on exactly what ComfyUI's loader gave.

        Raises ValueError, before anything is loaded, for a file that can't be read or holds another kind of model.
        """
        file = str(inputs[self.FILE_INPUT])
        self._check(file)
        loaded = self.pack.host.files.stock_load(self.STOCK, **inputs)
        try:
            self._register(pipeline.strip() or DEFAULT_PIPELINE, file, loaded)
        except Exception:
            # the model is loaded and works: that it is not shown by name must not cost the prompt
            logger.exception("%s is loaded but could not be registered", file)
        return (loaded,)

    def _check(self, file: str) -> None:
        files = self.pack.host.files
        if files.path(self.FOLDER, file) is None:
            return  # no file at all (`pixel_space`, a small VAE in parts), or one that ComfyUI will miss itself
        try:
            found = identify(files.header(self.FOLDER, file))
        except MissingFileError as error:
            raise ValueError(f"{error}. Download it again, or choose another file in {self.FOLDER}.") from None
        if not self._suits(found):
            raise ValueError(
                f"{file} is {_in_words(found)}, and this node loads {self.WANTED}. Choose another file in {self.FOLDER}, or "
                f"load this one with ComfyUI's own loader."
            )

    def _suits(self, found: Architecture) -> bool:
        # what nobody knows may be a WAN of tomorrow: ComfyUI's own loader decides
        return found.kind == self.HOLDS or found == UNKNOWN

    def _register(self, pipeline: str, file: str, loaded: Any) -> None:
        host = self.pack.host
        handle = host.models.handle(getattr(loaded, "patcher", loaded), host.files.path(self.FOLDER, file))
        self.pack.offloader.register(
            pipeline=pipeline,
            name=file,
            role=self.ROLE,
            handle=handle,
            node_id=host.execution.current_node(),
            policy=hosted_policy(self.ROLE, handle.elastic),
        )


def _in_words(found: Architecture) -> str:
    name = found.name if found.name != "unknown" else found.kind.replace("_", " ")
    return name if name.startswith(("a ", "an ")) else f"a {name} model" if found.kind in ("dit", "unknown") else f"a {name}"


class LoadDiffusionModel(RegisteringLoader):
    STOCK = "UNETLoader"
    ROLE = ComponentRole.GENERATOR
    FILE_INPUT = "unet_name"
    FOLDER = "diffusion_models"
    HOLDS = "dit"
    WANTED = "WAN diffusion models"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The diffusion model, exactly as ComfyUI's own loader gives it.",)
    DESCRIPTION = "Loads a WAN diffusion model as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "unet", "vram", "load diffusion model"]


class LoadTextEncoder(RegisteringLoader):
    STOCK = "CLIPLoader"
    ROLE = ComponentRole.TEXT_ENCODER
    FILE_INPUT = "clip_name"
    FOLDER = "text_encoders"
    HOLDS = "text_encoder"
    WANTED = "WAN's text encoder, UMT5-XXL"
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoder, exactly as ComfyUI's own loader gives it.",)
    DESCRIPTION = "Loads WAN's text encoder (UMT5) as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "umt5", "clip", "vram", "load text encoder"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = super().INPUT_TYPES()
        kinds = inputs["required"].get("type")
        if kinds and "wan" in _choices(kinds):
            options = kinds[1] if len(kinds) > 1 else {}
            inputs["required"]["type"] = (kinds[0], {**options, "default": "wan"})
        return inputs


class LoadVAE(RegisteringLoader):
    STOCK = "VAELoader"
    ROLE = ComponentRole.VAE
    FILE_INPUT = "vae_name"
    FOLDER = "vae"
    HOLDS = "vae"
    WANTED = "WAN's VAEs"
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("The VAE, exactly as ComfyUI's own loader gives it.",)
    DESCRIPTION = "Loads WAN's VAE as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "vae", "vram", "load vae"]


class LoadCLIPVision(RegisteringLoader):
    STOCK = "CLIPVisionLoader"
    ROLE = ComponentRole.CLIP_VISION
    FILE_INPUT = "clip_name"
    FOLDER = "clip_vision"
    HOLDS = "clip_vision"
    WANTED = "CLIP vision models"
    RETURN_TYPES = ("CLIP_VISION",)
    OUTPUT_TOOLTIPS = ("The image encoder, exactly as ComfyUI's own loader gives it.",)
    DESCRIPTION = "Loads WAN 2.1's image encoder (CLIP vision) as ComfyUI does and shows it by name in the VRAM bar."
    SEARCH_ALIASES: ClassVar = ["wan", "clip vision", "vram", "image encoder"]


def _choices(combo: Any) -> list[str]:
    """What a combo offers, in either way that ComfyUI declares one."""
    kind, options = combo[0], combo[1] if len(combo) > 1 else {}
    return list(options.get("options", ()) if isinstance(kind, str) else kind)


class LoadPipeline:
    """Everything that makes one video. It becomes the single loaders, so that another file is the only one loaded anew."""

    pack: ClassVar[Pack]

    FUNCTION = "load"
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "MODEL", "CLIP", "VAE", "CLIP_VISION")
    RETURN_NAMES = ("high_noise", "low_noise", "clip", "vae", "clip_vision")
    OUTPUT_TOOLTIPS = (
        "The diffusion model; of WAN 2.2 14B the one for the first steps.",
        "WAN 2.2's model for the last steps. Without one it is the same as high_noise.",
        "The text encoder.",
        "The VAE.",
        "The image encoder of WAN 2.1 image to video, where one is chosen.",
    )
    DESCRIPTION = (
        "Loads all models of a WAN pipeline at once: one diffusion model or WAN 2.2's two, text encoder, VAE and, for 2.1 "
        "image to video, the image encoder. Changing one file reloads that file only."
    )
    SEARCH_ALIASES: ClassVar = ["wan", "wan 2.2", "high noise", "low noise", "vram", "load all models", "pipeline"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = LoadDiffusionModel.INPUT_TYPES()["required"]
        files = _choices(model["unet_name"])
        clip_files = _choices(LoadCLIPVision.INPUT_TYPES()["required"]["clip_name"])
        vae = LoadVAE.INPUT_TYPES()["required"]["vae_name"]
        text = LoadTextEncoder.INPUT_TYPES()["required"]["clip_name"]
        return {
            "required": {
                "high_noise_model": (files, {"tooltip": "The diffusion model; of WAN 2.2 14B the high-noise one."}),
                "low_noise_model": ([NOTHING, *files], {"tooltip": "The low-noise one of WAN 2.2 14B; none for one model."}),
                "weight_dtype": model["weight_dtype"],
                "text_encoder": text,
                "vae": vae,
                "clip_vision": ([NOTHING, *clip_files], {"tooltip": "Only 2.1 image to video needs an image encoder."}),
            },
            "optional": {
                "pipeline": PIPELINE_INPUT,
                "text_encoder_device": (
                    ["default", "cpu"],
                    {"tooltip": "cpu: prompts are encoded on the processor, slowly, and take nothing of the card."},
                ),
            },
        }

    def load(
        self,
        high_noise_model: str,
        low_noise_model: str,
        weight_dtype: str,
        text_encoder: str,
        vae: str,
        clip_vision: str,
        pipeline: str = DEFAULT_PIPELINE,
        text_encoder_device: str = "default",
    ) -> dict[str, Any]:
        """The single loaders with these files, and which of them gives each output."""
        shared = {"pipeline": pipeline}
        wanted = [
            Wanted("high", DIFFUSION_MODEL, {"unet_name": high_noise_model, "weight_dtype": weight_dtype, **shared}),
            Wanted("text", TEXT_ENCODER, {"clip_name": text_encoder, "type": "wan", "device": text_encoder_device, **shared}),
            Wanted("vae", VAE, {"vae_name": vae, **shared}),
        ]
        low, vision = "high", None
        if low_noise_model != NOTHING:
            low = "low"
            wanted.append(
                Wanted("low", DIFFUSION_MODEL, {"unet_name": low_noise_model, "weight_dtype": weight_dtype, **shared})
            )
        if clip_vision != NOTHING:
            vision = "vision"
            wanted.append(Wanted("vision", CLIP_VISION, {"clip_name": clip_vision, **shared}))
        return self.pack.host.files.expand(
            wanted, ("high", low, "text", "vae", vision), "Load WAN Pipeline has no image encoder chosen under clip_vision"
        )


DIFFUSION_MODEL: Final = "VRAMHeadroomLoadDiffusionModel"
TEXT_ENCODER: Final = "VRAMHeadroomLoadTextEncoder"
VAE: Final = "VRAMHeadroomLoadVAE"
CLIP_VISION: Final = "VRAMHeadroomLoadCLIPVision"
PIPELINE: Final = "VRAMHeadroomLoadPipeline"

NODE_CLASSES: Final[dict[str, Any]] = {
    DIFFUSION_MODEL: LoadDiffusionModel,
    TEXT_ENCODER: LoadTextEncoder,
    VAE: LoadVAE,
    CLIP_VISION: LoadCLIPVision,
    PIPELINE: LoadPipeline,
}
NODE_NAMES: Final = {
    DIFFUSION_MODEL: "Load WAN Diffusion Model (VRAM Headroom)",
    TEXT_ENCODER: "Load WAN Text Encoder (VRAM Headroom)",
    VAE: "Load WAN VAE (VRAM Headroom)",
    CLIP_VISION: "Load WAN CLIP Vision (VRAM Headroom)",
    PIPELINE: "Load WAN Pipeline (VRAM Headroom)",
}
