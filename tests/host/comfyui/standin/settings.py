"""How this stand-in was started. Set once, before any of the stand-in's ComfyUI modules is imported."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    pack_root: Path
    base: Path
    """A temporary folder: models (unless given), input, output, temp, user, custom_nodes."""
    models: Path
    vram_bytes: int
    """0: no GPU at all, as `main.py --cpu`."""
    others_bytes: int = 0
    step_seconds: float = 0.0
    template: str | None = "video_wan2_2_14B_t2v"
    """The official workflow that is on the canvas when a browser comes without one of its own."""
    dynamic: bool = False
    """DynamicVRAM: models in comfy-aimdo's pages, ComfyUI's default on NVIDIA cards since 0.16."""
    aimdo: str = "0.4.13"
    """The comfy-aimdo that is played: 0.4.13, which ComfyUI 0.33 asks for, or 0.6.0."""
    frontend: Path | None = None
    """A folder with another comfyui_frontend_package than the installed one."""


_current: Settings | None = None


def configure(settings: Settings) -> None:
    global _current
    _current = settings


def current() -> Settings:
    if _current is None:
        raise RuntimeError("the stand-in is started with `python -m tests.host`, which sets its settings first")
    return _current
