"""Node classes made from the recorded definitions of a real ComfyUI: what /object_info says of them, and what they are."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths

from .behaviours import Behaviour, registered

DATA = Path(__file__).resolve().parents[2] / "data" / "nodes.json"

INPUT_EXTENSIONS = {
    "image": {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"},
    "video": {".mp4", ".webm", ".mkv", ".mov"},
    "audio": {".wav", ".mp3", ".flac", ".ogg"},
    "latent": {".latent"},
}


@cache
def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(DATA.read_text("utf-8"))["nodes"]


def files_in_input(kind: str) -> list[str]:
    folder = folder_paths.get_input_directory()
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in INPUT_EXTENSIONS[kind])


def with_files(value: Any) -> Any:
    """A recorded definition with today's file names where `$models:vae` and its like stand."""
    if isinstance(value, dict):
        return {key: with_files(item) for key, item in value.items()}
    if isinstance(value, list):
        return [filled for item in value for filled in _filled(item)]
    return value


def _filled(item: Any) -> Iterator[Any]:
    where, _, name = item.partition(":") if isinstance(item, str) else ("", "", "")
    if where == "$models":
        yield from folder_paths.get_filename_list(name)
    elif where == "$input":
        yield from files_in_input(name)
    else:
        yield with_files(item)


def object_info(name: str) -> dict[str, Any]:
    return with_files(recorded()[name])


def make_classes() -> dict[str, type]:
    behaviours = registered()
    return {name: _make_class(name, definition, behaviours.get(name)) for name, definition in recorded().items()}


def _make_class(name: str, definition: dict[str, Any], behaviour: Behaviour | None) -> type:
    def input_types(cls: type) -> dict[str, Any]:
        return with_files(definition["input"])

    attributes: dict[str, Any] = {
        "__doc__": f"{name} as a real ComfyUI defines it.",
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(definition["output"]),
        "RETURN_NAMES": tuple(definition["output_name"] or definition["output"]),
        "OUTPUT_IS_LIST": tuple(definition["output_is_list"]),
        "INPUT_IS_LIST": definition["is_input_list"],
        "OUTPUT_NODE": definition["output_node"],
        "CATEGORY": definition["category"],
        "RECORDED": True,
    }
    if behaviour is None:
        attributes |= {"FUNCTION": "absent", "absent": _absent(name)}
    else:
        attributes |= {"FUNCTION": behaviour.function, behaviour.function: _as_method(behaviour.run)}
        for extra, function in behaviour.extras.items():
            attributes[extra] = classmethod(function) if extra.isupper() else function
    return type(name, (), attributes)


def _as_method(run: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return method


def _absent(name: str) -> Callable[..., Any]:
    def absent(self: Any, **inputs: Any) -> Any:
        raise NotImplementedError(f"{name} is only described in this stand-in, it cannot run here")

    return absent
