"""ComfyUI's model folders and its stock loaders."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import folder_paths
import nodes as comfy_nodes

from ...vram.estimate.checkpoint import Checkpoint, CheckpointError, HeaderCache
from ...vram.plan.types import MissingFileError, UnreadableFileError
from .seams import SUBGRAPHS, SeamTable


class Wanted(NamedTuple):
    """A node that another one expands into."""

    name: str
    class_type: str
    inputs: Mapping[str, object]


class HostFiles:
    """Finds model files where ComfyUI would, and loads them as ComfyUI does."""

    def __init__(self, seams: SeamTable) -> None:
        self._headers = HeaderCache()
        graphs = _graph_tools()
        self._graphs = graphs if seams.note(SUBGRAPHS, live=graphs is not None) else None

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

    def expand(self, wanted: Sequence[Wanted], results: Sequence[str | None], unused: str) -> dict[str, Any]:
        """What a node returns that becomes these nodes: its outputs are theirs, by name.

        An output of None stops whatever needs it, with `unused` as the reason. Raises RuntimeError where nodes can't expand.
        """
        if self._graphs is None:
            raise RuntimeError("this ComfyUI can't expand a node into others; use the single loaders")
        graph = self._graphs.GraphBuilder()
        made = {one.name: graph.node(one.class_type, one.name, **one.inputs) for one in wanted}
        outputs = tuple(self._graphs.ExecutionBlocker(unused) if name is None else made[name].out(0) for name in results)
        return {"result": outputs, "expand": graph.finalize()}


def _graph_tools() -> Any:
    try:
        found = importlib.import_module("comfy_execution.graph_utils")
    except ImportError:
        return None
    return found if hasattr(found, "GraphBuilder") and hasattr(found, "ExecutionBlocker") else None


def size_on_disk(path: str) -> int:
    """0 for a file that is gone by now."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
