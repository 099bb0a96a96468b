"""What is recorded of ComfyUI's modules, as the tests read it: surface.json, and what surface.txt declares about classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .introspect import read_table

HERE = Path(__file__).resolve().parent
_OTHER_ROOTS = {"app", "api_server", "latent_preview", "node_helpers", "execution", "folder_paths", "nodes", "server"}
_PLAIN_TYPES = {"str", "int", "float", "bool", "list", "dict", "tuple", "set", "NoneType", "ContextVar"}


class Surface(NamedTuple):
    """What is recorded of ComfyUI: per version, name -> kind and signature; and the classes the table declares."""

    versions: Mapping[str, Mapping[str, str]]
    instance_of: Mapping[str, str]
    elements_of: Mapping[str, str]

    def kinds(self, name: str) -> dict[str, str]:
        return {version: names[name] for version, names in self.versions.items() if name in names}

    def has_children_of_its_own(self, name: str) -> bool:
        """Whether an attribute of `name` is ComfyUI's, rather than one of a plain value or of a function."""
        return any(
            kind == "module" or kind.startswith("class") or (kind.startswith("value ") and kind[6:] not in _PLAIN_TYPES)
            for kind in self.kinds(name).values()
        )

    def is_called(self, name: str) -> bool:
        return any("function" in kind or "method" in kind for kind in self.kinds(name).values())


def load_surface() -> Surface:
    table = list(read_table((HERE / "surface.txt").read_text(encoding="utf-8")))
    return Surface(
        json.loads((HERE.parent / "data" / "surface.json").read_text(encoding="utf-8")),
        {name: cls for name, cls, _ in table if cls},
        {name: cls for name, _, cls in table if cls},
    )


def is_comfyui(module: str) -> bool:
    root = module.partition(".")[0]
    return root.startswith("comfy") or root in _OTHER_ROOTS
