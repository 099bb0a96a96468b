"""ComfyUI's model folders and its stock loaders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import folder_paths
import nodes as comfy_nodes

from ...vram.estimate.checkpoint import Checkpoint, CheckpointError, HeaderCache
from ...vram.plan.types import MissingFileError, UnreadableFileError


class HostFiles:
    """Finds model files where ComfyUI would, and loads them as ComfyUI does."""

    def __init__(self) -> None:
        self._headers = HeaderCache()

    def path(self, folder: str, name: str) -> str | None:
        """Absolute path of a model file, or None if no such file is in that folder."""
        return folder_paths.get_full_path(folder, name)

    def names(self, folder: str) -> Sequence[str]:
        """Model files in a folder of ComfyUI's; none where it has no such folder."""
        try:
            return folder_paths.get_filename_list(folder)
        except (KeyError, OSError):
            return ()

    def header(self, folder: str, name: str) -> Checkpoint:
        """The header of a model file. Raises MissingFileError, with the reason, if there is none to read."""
        path = self.path(folder, name)
        if path is None:
            raise MissingFileError(f"{name} is not in models/{folder}")
        try:
            return self._headers.get(path)
        except CheckpointError as error:
            raise UnreadableFileError(f"the size of {name} can't be read: {error}", str(path), size_on_disk(path)) from error

    def stock_inputs(self, class_name: str) -> dict[str, Any]:
        """INPUT_TYPES of a stock node, as it declares them now: file lists are read anew each time."""
        return comfy_nodes.NODE_CLASS_MAPPINGS[class_name].INPUT_TYPES()

    def stock_load(self, class_name: str, **inputs: object) -> Any:
        """Run a stock loader and return the one thing it loads. Raises whatever the loader raises."""
        loader = comfy_nodes.NODE_CLASS_MAPPINGS[class_name]
        return getattr(loader(), loader.FUNCTION)(**inputs)[0]


def size_on_disk(path: str) -> int:
    """0 for a file that is gone by now."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
