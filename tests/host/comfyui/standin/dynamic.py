"""Turns DynamicVRAM on, as ComfyUI's main.py does (0.33, lines 98-108 and 303-328) before it loads any node."""

from typing import Any

import comfy.memory_management as memory_management
import comfy.model_management as model_management
import comfy.model_patcher as model_patcher
import comfy_aimdo.control as control
from comfy_aimdo.model_vbar import callers

from .card import pages


def enable_if_wanted() -> None:
    """Not without a GPU: `--cpu` turns it off (0.33, cli_args.py:315)."""
    if pages() is None:
        return
    control.init(nvml_pressure=True)
    if control.init_devices((device.index, 0) for device in model_management.get_all_torch_devices()):
        model_patcher.CoreModelPatcher = model_patcher.ModelPatcherDynamic
        memory_management.aimdo_enabled = True


def bytes_on_card(patcher: Any) -> int:
    """loaded_size() from any thread: the real one may be asked by the worker only."""
    if not patcher.is_dynamic():
        return patcher.loaded_size()
    vbars = patcher.model.dynamic_vbars.values()
    return sum(vbar._vbar.resident_bytes for vbar in vbars) + patcher.model.model_loaded_weight_memory


def report() -> dict[str, Any] | None:
    """comfy-aimdo's books: totals in bytes, its models from the least important to the most important one. Read past the
    Python surface, so that `callers` holds only what ComfyUI and packs called."""
    books = pages()
    if books is None:
        return None
    staged = {
        vbar._vbar: (model.file.name, model.staged)
        for model in (entry.model.model for entry in model_management.current_loaded_models if entry.model is not None)
        for vbar in getattr(model, "dynamic_vbars", {}).values()
    }
    models: list[dict[str, Any]] = []
    for vbar in books.order:
        file, layers = staged.get(vbar, (None, None))
        models.append(
            {
                "owner": vbar.label,
                "file": file,
                "nr_pages": len(vbar.pages),
                "watermark": vbar.watermark,
                "watermark_limit": vbar.watermark_limit,
                "resident_pages": [number for number, page in enumerate(vbar.pages) if page.resident],
                "pinned_pages": [number for number, page in enumerate(vbar.pages) if page.pins],
                "resident_bytes": vbar.resident_bytes,
                "staged_bytes": None if layers is None else layers.nbytes,
                "forced_bytes": None if layers is None else layers.forced_bytes,
                "ram_bytes": None if layers is None else layers.ram_bytes,
                "read_from_file": None if layers is None else layers.read_from_file,
                "copied_from_ram": None if layers is None else layers.copied_from_ram,
                "streamed": None if layers is None else layers.streamed,
            }
        )
    return {
        "total_vram_usage": books.total_usage,
        "resident_bytes": books.resident_bytes,
        "simple_headroom": books.simple_headroom,
        "models": models,
        "callers": [{"method": method, "thread": thread, "calls": calls} for (method, thread), calls in callers.items()],
    }
