"""VRAM Headroom: tells before you queue whether a WAN video graph fits, and shows where every gigabyte goes."""

from importlib.util import find_spec
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY: str | None = "./web"

# ComfyUI imports this file by path. Whatever else does (pytest, a type checker) has no ComfyUI to connect to.
if __package__ and find_spec("comfy") is not None and find_spec("folder_paths") is not None:
    from .nodes import connect

    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY = connect()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
