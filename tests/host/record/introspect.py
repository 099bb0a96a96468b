"""Looks the names of surface.txt up in the Python it runs in and writes what each one is to a JSON file.

    python introspect.py FOLDER OUT.json [FIRST.py]

FOLDER holds the modules: the root of a ComfyUI checkout, or the stand-in's modules, which FIRST.py sets up before they are
imported. Run by path, it needs nothing but the standard library, because it runs in whatever Python that ComfyUI has. It
records kinds and signatures, never code or prose.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

ABSENT = "absent"
_PLAIN_DEFAULTS = (type(None), bool, int, float, str, bytes)
_LINE = re.compile(r"^(?P<indent> *)(?P<name>\w+)(?: (?P<how>->|\[\]) (?P<cls>[\w.]+))?$")


def read_table(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, class of the value or "", class of its elements or "") for each line of the table."""
    trail: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.match(line)
        depth = len(found["indent"]) // 4 if found else -1
        if found is None or depth > len(trail) or len(found["indent"]) % 4:
            raise ValueError(f"surface table, line {number}: {line!r}")
        trail[depth:] = [found["name"]]
        how, cls = found["how"], found["cls"] or ""
        yield ".".join(trail), cls if how == "->" else "", cls if how == "[]" else ""


def describe_all(names: list[str]) -> dict[str, str]:
    """Describe each name; a parent always comes before its children."""
    found: dict[str, str] = {}
    objects: dict[str, Any] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        if parent and parent not in objects:
            found[name] = ABSENT
            continue
        owner = objects.get(parent)
        entry, value = _in_class(owner, last) if isinstance(owner, type) else _in_module(owner, name, last)
        found[name] = entry
        if entry != ABSENT:
            objects[name] = value
    return found


def _in_module(owner: Any, name: str, last: str) -> tuple[str, Any]:
    missing = object()
    value = missing if owner is None else getattr(owner, last, missing)
    if value is missing and (owner is None or hasattr(owner, "__path__")):
        try:
            value = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
    return (ABSENT, None) if value is missing else (_describe(value), value)


def _describe(value: Any) -> str:
    if isinstance(value, ModuleType):
        return "module"
    if isinstance(value, type):
        # The constructors of enums and exceptions are Python's, and differ between its versions.
        return "class" if issubclass(value, (Enum, BaseException)) else f"class {_signature(value)}"
    if inspect.iscoroutinefunction(value):
        return f"async function {_signature(value)}"
    if callable(value) and hasattr(value, "__code__"):
        return f"function {_signature(value)}"
    return f"value {type(value).__name__}"


def _in_class(owner: type, last: str) -> tuple[str, Any]:
    missing = object()
    value = inspect.getattr_static(owner, last, missing)
    if value is missing or (inspect.isdatadescriptor(value) and not isinstance(value, property)):
        # Set on the instance, or a slot or a NamedTuple field: all of them are read as plain attributes.
        return ("attribute", None) if value is not missing or _set_by_methods(owner, last) else (ABSENT, None)
    if isinstance(value, property):
        return "property", None
    if isinstance(value, staticmethod):
        return f"static method {_signature(value.__func__)}", None
    if isinstance(value, classmethod):
        return f"class method {_signature(value.__func__)}", None
    if inspect.iscoroutinefunction(value):
        return f"async method {_signature(value)}", None
    if inspect.isfunction(value):
        return f"method {_signature(value)}", None
    return "attribute", value if isinstance(value, type) else None


def _set_by_methods(owner: type, name: str) -> bool:
    for cls in owner.__mro__:
        if name in getattr(cls, "__annotations__", {}):
            return True
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and node.attr == name
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", cls.__name__)
            ):
                return True
    return False


class _Shown:
    """A default that prints as the text it was given, so that a signature prints without addresses."""

    def __init__(self, value: Any) -> None:
        self._text = _show(value)

    def __repr__(self) -> str:
        return self._text


def _signature(value: Any) -> str:
    """Names, kinds (by Python's own / and *) and defaults, without annotations; "(?)" where Python cannot tell."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(?)"
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=empty if p.default is empty else _Shown(p.default))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_show(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, _PLAIN_DEFAULTS) or (isinstance(value, dict) and not value):
        return repr(value)
    shown = repr(value)
    return shown if shown.startswith("torch.") else f"<{type(value).__name__}>"


def main() -> None:
    root, out, *first = sys.argv[1:]
    sys.argv[1:] = ["--cpu"]
    sys.path[0] = root
    for script in first:
        runpy.run_path(script)
    names = [name for name, _, _ in read_table(Path(__file__).with_name("surface.txt").read_text(encoding="utf-8"))]
    with contextlib.suppress(ModuleNotFoundError):  # the stand-in has neither
        importlib.import_module("comfy.options").enable_args_parsing()
        # As main.py does: before `nodes` puts another module of that name on sys.path.
        importlib.import_module("utils.install_util")
    Path(out).write_text(json.dumps(describe_all(names)), encoding="utf-8")


if __name__ == "__main__":
    main()
