"""Custom nodes for tests with DynamicVRAM: what GGUF loaders do (a legacy patcher beside dynamic ones), and eyes on pages."""

import comfy.sd
import folder_paths
from comfy.model_management import current_loaded_models
from standin.dynamic import report
from standin.journal import journal


class LegacyDiffusionModelLoader:
    """As ComfyUI-GGUF: its model has a patcher of its own, which knows no pages."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"unet_name": (folder_paths.get_filename_list("diffusion_models"),)}}

    def load(self, unet_name):
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return (comfy.sd.load_diffusion_model(path, disable_dynamic=True),)


class KeepPages:
    """Sets the watermark limit of every loaded dynamic model, then notes comfy-aimdo's books while this node still runs."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "keep"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"through": ("CONDITIONING",), "limit_mib": ("INT", {"default": 64})}}

    def keep(self, through, limit_mib):
        for entry in current_loaded_models:
            if entry.model.is_dynamic():
                entry.model._vbar_get().set_watermark_limit(limit_mib << 20)
        journal.note("pages", **(report() or {}))
        return (through,)


class LookAtPages:
    """Notes comfy-aimdo's books."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "look"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"through": ("CONDITIONING",)}}

    def look(self, through):
        journal.note("pages", **(report() or {}))
        return (through,)


NODE_CLASS_MAPPINGS = {
    "LegacyDiffusionModelLoader": LegacyDiffusionModelLoader,
    "KeepPages": KeepPages,
    "LookAtPages": LookAtPages,
}
