"""Input definitions as they are for one node of one prompt: growing and conditional inputs of ComfyUI's V3 nodes unfolded."""

from typing import Any

Definitions = dict[str, dict[str, Any]]


def unfolded(definitions: Definitions, given: dict[str, Any]) -> Definitions:
    """The node's inputs with `values.a`, `format.codec` and their like in place of the input that brings them."""
    result: Definitions = {"required": {}, "optional": {}, "hidden": dict(definitions.get("hidden", {}))}
    for category in ("required", "optional"):
        for name, definition in definitions.get(category, {}).items():
            _unfold(name, definition, category, given, result)
    return result


def _unfold(name: str, definition: Any, category: str, given: dict[str, Any], result: Definitions) -> None:
    kind = definition[0]
    options = definition[1] if len(definition) > 1 else {}
    if kind == "COMFY_AUTOGROW_V3":
        template = options["template"]
        inner = next(iter(next(iter(template["input"].values())).values()))
        names = template.get("names") or [f"{template['prefix']}{index}" for index in range(template.get("max", 1))]
        for index, part in enumerate(names):
            place = "required" if index < template.get("min", 0) and category == "required" else "optional"
            result[place][f"{name}.{part}"] = inner
    elif kind == "COMFY_DYNAMICCOMBO_V3":
        result[category][name] = ["COMBO", {**options, "options": [option["key"] for option in options["options"]]}]
        for option in options["options"]:
            if option["key"] == given.get(name):
                for inner_category in ("required", "optional"):
                    for inner, inner_definition in option["inputs"].get(inner_category, {}).items():
                        _unfold(f"{name}.{inner}", inner_definition, inner_category, given, result)
    else:
        result[category][name] = definition
