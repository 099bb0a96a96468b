"""Loads the pack as ComfyUI does: by path, from a folder of any name, never through sys.path.

Tests import it under one canonical module name, `vram_headroom`, so that all see the same classes and singletons.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CANONICAL_NAME = "vram_headroom"


def load_pack(name: str = CANONICAL_NAME, folder: Path = ROOT) -> ModuleType:
    """Import the pack in `folder` under the module name `name`; a second call returns the first module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no pack in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
