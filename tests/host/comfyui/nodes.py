"""The node classes of this stand-in, and loading of custom nodes as ComfyUI 0.33 does it."""

import importlib.util
import logging
import os
import sys
import traceback
from typing import Any

import comfy.model_management
import folder_paths
from comfy_execution.inputs import unfolded

EXTENSION_WEB_DIRS: dict[str, str] = {}
LOADED_MODULE_DIRS: dict[str, str] = {}
NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
MAX_RESOLUTION = 16384


def before_node_execution() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def interrupt_processing(value: bool = True) -> None:
    comfy.model_management.interrupt_current_processing(value)


def inputs_of(class_def: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node as they are for what one prompt gives it."""
    definitions = class_def.INPUT_TYPES()
    return unfolded(definitions, given) if getattr(class_def, "RECORDED", False) else definitions


def init_builtin_nodes() -> None:
    from standin import definitions

    classes = definitions.make_classes()
    NODE_CLASS_MAPPINGS.update(classes)
    for name in classes:
        NODE_DISPLAY_NAME_MAPPINGS[name] = definitions.recorded()[name]["display_name"] or name
        # `from nodes import VAELoader` works in ComfyUI, where these are plain classes of this module.
        globals().setdefault(name, classes[name])


def get_module_name(module_path: str) -> str:
    name = os.path.basename(os.path.normpath(module_path))
    return os.path.splitext(name)[0] if os.path.isfile(module_path) else name


def load_custom_node(module_path: str, ignore: frozenset[str] = frozenset()) -> bool:
    """Import one folder or file of custom_nodes by path, under ComfyUI's module name for it; False and a log if it fails."""
    name = get_module_name(module_path)
    is_file = os.path.isfile(module_path)
    sys_name = os.path.splitext(module_path)[0] if is_file else module_path.replace(".", "_x_")
    entry = module_path if is_file else os.path.join(module_path, "__init__.py")
    folder = os.path.dirname(module_path) if is_file else module_path
    try:
        spec = importlib.util.spec_from_file_location(sys_name, entry)
        if spec is None or spec.loader is None:
            raise ImportError(f"{entry} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[sys_name] = module
        spec.loader.exec_module(module)
        LOADED_MODULE_DIRS[name] = os.path.abspath(folder)
        _register_web_directories(module, module_path, folder, name)
        mappings = getattr(module, "NODE_CLASS_MAPPINGS", None)
        if mappings is None:
            logging.warning("Skip %s module for custom nodes due to the lack of NODE_CLASS_MAPPINGS.", module_path)
            return False
        for node_name, node_class in mappings.items():
            if node_name not in ignore:
                NODE_CLASS_MAPPINGS[node_name] = node_class
                node_class.RELATIVE_PYTHON_MODULE = f"custom_nodes.{name}"
        NODE_DISPLAY_NAME_MAPPINGS.update(getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None) or {})
        return True
    except Exception as error:
        logging.warning(traceback.format_exc())
        logging.warning("Cannot import %s module for custom nodes: %s", module_path, error)
        return False


def _register_web_directories(module: Any, module_path: str, folder: str, name: str) -> None:
    """Both ways ComfyUI knows: `[tool.comfy] web`, served under the project's name, and WEB_DIRECTORY, under the folder's."""
    project = _project(module_path)
    web = project.get("tool", {}).get("comfy", {}).get("web")
    if web and os.path.isdir(os.path.join(module_path, web)):
        EXTENSION_WEB_DIRS[project["project"]["name"]] = os.path.join(module_path, web)
    directory = getattr(module, "WEB_DIRECTORY", None)
    if directory is not None:
        path = os.path.abspath(os.path.join(folder, directory))
        if os.path.isdir(path):
            EXTENSION_WEB_DIRS[name] = path


def _project(module_path: str) -> dict[str, Any]:
    path = os.path.join(module_path, "pyproject.toml")
    if sys.version_info < (3, 11) or not os.path.isfile(path):
        return {}
    import tomllib

    with open(path, "rb") as file:
        return tomllib.load(file)


def init_external_custom_nodes() -> dict[str, bool]:
    """Load every folder of custom_nodes; core nodes cannot be replaced."""
    core = frozenset(NODE_CLASS_MAPPINGS)
    results: dict[str, bool] = {}
    for root in folder_paths.get_folder_paths("custom_nodes"):
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if name == "__pycache__" or name.endswith(".disabled") or (os.path.isfile(path) and not name.endswith(".py")):
                continue
            results[name] = load_custom_node(path, core)
    return results
