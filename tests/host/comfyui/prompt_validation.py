"""Is this a prompt that can run? Errors in the shape ComfyUI 0.33 gives them. `execution` offers this under ComfyUI's name."""

import inspect
import logging
import sys
import traceback
from typing import Any

import nodes
from comfy_execution.graph import get_input_info
from comfy_execution.validation import validate_node_input

Error = dict[str, Any]
Verdict = tuple[bool, list[Error], str]

CONVERT = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
LONGEST_LIST_TO_SHOW = 20


def full_type_name(klass: Any) -> str:
    module = klass.__module__
    return klass.__qualname__ if module == "builtins" else f"{module}.{klass.__qualname__}"


def _error(kind: str, message: str, details: str, **extra_info: Any) -> Error:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


async def validate_prompt(
    prompt_id: str, prompt: dict[str, Any], partial_execution_list: list[str] | None
) -> tuple[bool, Error | None, list[str], dict[str, Any]]:
    """Whether at least one output can run, the error if none can, the outputs that can, and what is wrong per node."""
    outputs: set[str] = set()
    for node_id, node in prompt.items():
        missing = _missing_type(node_id, node)
        if missing is not None:
            return False, missing, [], {}
        class_def = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        wanted = partial_execution_list is None or node_id in partial_execution_list
        if getattr(class_def, "OUTPUT_NODE", False) is True and wanted:
            outputs.add(node_id)
    if not outputs:
        return False, _error("prompt_no_outputs", "Prompt has no outputs", ""), [], {}

    good: set[str] = set()
    failures: list[Error] = []
    node_errors: dict[str, Any] = {}
    validated: dict[str, Verdict] = {}
    for output in outputs:
        try:
            valid, reasons, _ = await _validate_node(prompt_id, prompt, output, validated, [])
        except Exception as error:
            kind, _, trace = sys.exc_info()
            extra = {"exception_type": full_type_name(kind), "traceback": traceback.format_tb(trace)}
            reasons = [_error("exception_during_validation", "Exception when validating node", str(error), **extra)]
            valid = False
            validated[output] = (False, reasons, output)
        if valid:
            good.add(output)
            continue
        failures.extend(reasons)
        for node_id, (node_valid, node_reasons, _) in validated.items():
            if not node_valid and node_reasons:
                class_type = prompt[node_id]["class_type"]
                found = node_errors.setdefault(
                    node_id, {"errors": node_reasons, "dependent_outputs": [], "class_type": class_type}
                )
                found["dependent_outputs"].append(output)
        logging.error("Failed to validate prompt for output %s: output will be ignored", output)
    if good:
        return True, None, list(good), node_errors
    details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in failures)
    error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
    return False, error, [], node_errors


def _missing_type(node_id: str, node: dict[str, Any]) -> Error | None:
    class_type = node.get("class_type")
    if class_type in nodes.NODE_CLASS_MAPPINGS:
        return None
    title = node.get("_meta", {}).get("title", class_type)
    if "class_type" not in node:
        message = (
            f"Node '{title or f'ID #{node_id}'}' has no class_type. The workflow may be corrupted or a custom node is missing."
        )
    else:
        message = f"Node '{title}' not found. The custom node may not be installed."
    extra = {"node_id": node_id, "class_type": class_type, "node_title": title}
    return _error("missing_node_type", message, f"Node ID '#{node_id}'", **extra)


async def _validate_node(
    prompt_id: str, prompt: dict[str, Any], node_id: str, validated: dict[str, Verdict], visiting: list[str]
) -> Verdict:
    if node_id in validated:
        return validated[node_id]
    if node_id in visiting:
        _blame_cycle(prompt, [*visiting[visiting.index(node_id) :], node_id], validated)
        return validated[node_id]
    node = prompt[node_id]
    class_def = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
    inputs = node["inputs"]
    definitions = nodes.inputs_of(class_def, inputs)
    checker = getattr(class_def, "VALIDATE_INPUTS", None)
    spec = inspect.getfullargspec(checker) if checker else None
    own = set(spec.args) if spec else set()
    checks_all = bool(spec and spec.varkw)

    errors: list[Error] = []
    valid = True
    received: dict[str, Any] = {}
    for name in [*definitions.get("required", {}), *definitions.get("optional", {})]:
        kind, category, options = get_input_info(class_def, name, definitions)
        if name not in inputs:
            if category == "required":
                errors.append(_error("required_input_missing", "Required input is missing", name, input_name=name))
            continue
        config = (kind, options)
        value = inputs[name]
        if isinstance(value, list):
            error, source_valid = await _validate_link(
                prompt_id, prompt, node_id, name, value, config, "input_types" in own, received, validated, visiting
            )
            valid = valid and source_valid
        else:
            checked_by_node = name in own or checks_all
            inputs[name], error = _validate_value(name, value, config, checked_by_node)
        if error is not None:
            errors.append(error)
    if own or checks_all:
        errors.extend(await _ask_node(prompt_id, node_id, class_def, inputs, own, checks_all, received))

    known = validated.get(node_id, (True, [], node_id))
    verdict = (
        known[0] and valid and not errors,
        known[1] + [error for error in errors if error not in known[1]],
        node_id,
    )
    validated[node_id] = verdict
    return verdict


def _blame_cycle(prompt: dict[str, Any], path: list[str], validated: dict[str, Verdict]) -> None:
    members = list(dict.fromkeys(path))
    text = " -> ".join(f"{node_id} ({prompt[node_id]['class_type']})" for node_id in path)
    for node_id in members:
        extra = {"node_id": node_id, "cycle_nodes": members}
        error = _error("dependency_cycle", "Dependency cycle detected", text, **extra)
        validated[node_id] = (False, [error], node_id)


async def _validate_link(
    prompt_id: str,
    prompt: dict[str, Any],
    node_id: str,
    name: str,
    link: list[Any],
    config: Any,
    node_checks_types: bool,
    received: dict[str, Any],
    validated: dict[str, Verdict],
    visiting: list[str],
) -> tuple[Error | None, bool]:
    if len(link) != 2:
        message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
        extra = {"input_name": name, "input_config": config, "received_value": link}
        return _error("bad_linked_input", message, name, **extra), True
    source = link[0]
    kind = nodes.NODE_CLASS_MAPPINGS[prompt[source]["class_type"]].RETURN_TYPES[link[1]]
    received[name] = kind
    if not node_checks_types and not validate_node_input(kind, config[0]):
        details = f"{name}, received_type({kind}) mismatch input_type({config[0]})"
        extra = {"input_name": name, "input_config": config, "received_type": kind, "linked_node": link}
        return _error("return_type_mismatch", "Return type mismatch between linked nodes", details, **extra), True
    try:
        source_valid, _, _ = await _validate_node(prompt_id, prompt, source, validated, [*visiting, node_id])
        return None, source_valid
    except Exception as error:
        raised, _, trace = sys.exc_info()
        extra = {
            "input_name": name,
            "input_config": config,
            "exception_message": str(error),
            "exception_type": full_type_name(raised),
            "traceback": traceback.format_tb(trace),
            "linked_node": link,
        }
        reason = _error("exception_during_inner_validation", "Exception when validating inner node", str(error), **extra)
        validated[source] = (False, [reason], source)
        return None, False


def _validate_value(name: str, value: Any, config: Any, checked_by_node: bool) -> tuple[Any, Error | None]:
    """The value as its type wants it, and what is wrong with it."""
    kind, options = config
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    try:
        if isinstance(kind, str) and kind in CONVERT:
            value = CONVERT[kind](value)
    except Exception as error:
        message = f"Failed to convert an input value to a {kind} value"
        extra = {"input_name": name, "input_config": config, "received_value": value, "exception_message": str(error)}
        return value, _error("invalid_input_type", message, f"{name}, {value}, {error}", **extra)
    if checked_by_node:
        return value, None
    extra = {"input_name": name, "input_config": config, "received_value": value}
    if "min" in options and value < options["min"]:
        message = f"Value {value} smaller than min of {options['min']}"
        return value, _error("value_smaller_than_min", message, name, **extra)
    if "max" in options and value > options["max"]:
        message = f"Value {value} bigger than max of {options['max']}"
        return value, _error("value_bigger_than_max", message, name, **extra)
    if isinstance(kind, list | tuple) or kind == "COMBO":
        choices = options.get("options", []) if kind == "COMBO" else kind
        several = options.get("multiselect") and isinstance(value, list)
        wrong = [one for one in (value if several else [value]) if one not in choices]
        if wrong:
            shown = str(list(choices))
            if len(choices) > LONGEST_LIST_TO_SHOW:
                shown = f"(list of length {len(choices)})"
                extra["input_config"] = None
            details = f"{name}: {', '.join(repr(one) for one in wrong)} not in {shown}"
            return value, _error("value_not_in_list", "Value not in list", details, **extra)
    return value, None


async def _ask_node(
    prompt_id: str,
    node_id: str,
    class_def: Any,
    inputs: dict[str, Any],
    own: set[str],
    checks_all: bool,
    received: dict[str, Any],
) -> list[Error]:
    """What the node's own VALIDATE_INPUTS says, one error per input it takes."""
    import execution

    data, _, _ = execution.get_input_data(inputs, class_def, node_id)
    asked = {name: values for name, values in data.items() if name in own or checks_all}
    if "input_types" in own:
        asked["input_types"] = [received]
    answers = await execution.map_over_lists(prompt_id, node_id, class_def, asked, "VALIDATE_INPUTS")
    errors = []
    for name in asked:
        for answer in answers:
            if answer is not True:
                details = name if answer is False else f"{name} - {answer}"
                errors.append(_error("custom_validation_failed", "Custom validation failed for node", details, input_name=name))
    return errors
