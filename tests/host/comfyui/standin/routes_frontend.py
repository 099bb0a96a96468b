"""ComfyUI's real front end, the official workflow templates, the packs' scripts, and what the front end asks at start."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import comfy.model_management as model_management
import comfyui_version
import folder_paths
import nodes
from aiohttp import web

from . import settings


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed: pip install -r tests/requirements.txt")
    return Path(spec.origin).parent


def static_folder() -> Path:
    other = settings.current().frontend
    package = _package("comfyui_frontend_package") if other is None else other / "comfyui_frontend_package"
    return package / "static"


def templates_folder() -> Path:
    return _package("comfyui_workflow_templates_json") / "templates"


def add(routes: web.RouteTableDef, web_root: str) -> None:
    @routes.get("/")
    async def root(request: web.Request) -> web.StreamResponse:
        """The front end; a bare address opens the official workflow on its canvas, by the front end's own parameter."""
        template = settings.current().template
        if template and not request.query_string:
            raise web.HTTPFound(f"/?template={quote(template)}")
        return web.FileResponse(os.path.join(web_root, "index.html"), headers={"Cache-Control": "no-store"})

    @routes.get("/extensions")
    async def extensions(request: web.Request) -> web.Response:
        found = _scripts(web_root, os.path.join(web_root, "extensions"), "/extensions/")
        for name, folder in nodes.EXTENSION_WEB_DIRS.items():
            found += _scripts(folder, folder, f"/extensions/{quote(name)}/")
        return web.json_response(found)

    @routes.get("/system_stats")
    async def system_stats(request: web.Request) -> web.Response:
        return web.json_response(_system_stats())

    @routes.get("/workflow_templates")
    async def workflow_templates(request: web.Request) -> web.Response:
        return web.json_response({})

    @routes.get("/i18n")
    async def i18n(request: web.Request) -> web.Response:
        return web.json_response(_translations())

    @routes.get("/global_subgraphs")
    async def global_subgraphs(request: web.Request) -> web.Response:
        return web.json_response({})

    @routes.get("/node_replacements")
    async def node_replacements(request: web.Request) -> web.Response:
        return web.json_response({})

    @routes.get("/embeddings")
    async def embeddings(request: web.Request) -> web.Response:
        return web.json_response([os.path.splitext(name)[0] for name in folder_paths.get_filename_list("embeddings")])

    @routes.get("/models")
    async def model_types(request: web.Request) -> web.Response:
        return web.json_response(list(folder_paths.folder_names_and_paths))

    @routes.get("/models/{folder}")
    async def models(request: web.Request) -> web.Response:
        folder = request.match_info["folder"]
        if folder not in folder_paths.folder_names_and_paths:
            return web.Response(status=404)
        return web.json_response(folder_paths.get_filename_list(folder))

    @routes.get("/experiment/models")
    async def experiment_models(request: web.Request) -> web.Response:
        known = folder_paths.folder_names_and_paths
        return web.json_response([{"name": name, "folders": known[name][0]} for name in known if name != "custom_nodes"])

    @routes.get("/experiment/models/{folder}")
    async def experiment_models_of(request: web.Request) -> web.Response:
        folder = request.match_info["folder"]
        if folder not in folder_paths.folder_names_and_paths:
            return web.Response(status=404)
        names = folder_paths.get_filename_list(folder)
        return web.json_response([{"name": name, "pathIndex": 0} for name in names])

    @routes.get("/view_metadata/{folder}")
    async def view_metadata(request: web.Request) -> web.Response:
        return web.Response(status=404)

    @routes.get("/internal/logs")
    @routes.get("/internal/logs/raw")
    async def logs(request: web.Request) -> web.Response:
        return web.json_response({"entries": [], "size": {"cols": 80, "rows": 24}})

    @routes.patch("/internal/logs/subscribe")
    async def subscribe(request: web.Request) -> web.Response:
        return web.Response(status=200)

    @routes.get("/internal/folder_paths")
    async def internal_folder_paths(request: web.Request) -> web.Response:
        return web.json_response({name: paths for name, (paths, _) in folder_paths.folder_names_and_paths.items()})

    @routes.get("/internal/files/{kind}")
    async def internal_files(request: web.Request) -> web.Response:
        folder = folder_paths.get_directory_by_type(request.match_info["kind"])
        return web.json_response(sorted(os.listdir(folder)) if folder else [])


def add_static(app: web.Application, web_root: str) -> None:
    app.add_routes([web.static("/templates", templates_folder()), web.static("/", web_root)])


def _scripts(root: str, folder: str, prefix: str) -> list[str]:
    base = folder if folder != root else root
    return sorted(prefix + quote(path.relative_to(base).as_posix()) for path in Path(folder).rglob("*.js") if path.is_file())


def _translations() -> dict[str, Any]:
    """The packs' `locales/<language>/*.json`, merged per language as ComfyUI serves them."""
    merged: dict[str, Any] = {}
    parts = {"main": None, "nodeDefs": "nodeDefs", "commands": "commands", "settings": "settings"}
    for folder in nodes.LOADED_MODULE_DIRS.values():
        for language in Path(folder, "locales").glob("*"):
            for name, key in parts.items():
                path = language / f"{name}.json"
                if path.is_file():
                    content = json.loads(path.read_text("utf-8"))
                    target = merged.setdefault(language.name, {})
                    target.update(content if key is None else {key: target.get(key, {}) | content})
    return merged


def _system_stats() -> dict[str, Any]:
    device = model_management.get_torch_device()
    total, torch_total = model_management.get_total_memory(device, torch_total_too=True)
    free, torch_free = model_management.get_free_memory(device, torch_free_too=True)
    return {
        "system": {
            "os": os.name,
            "ram_total": model_management.RAM_BYTES,
            "ram_free": model_management.RAM_BYTES,
            "comfyui_version": comfyui_version.__version__,
            "required_frontend_version": None,
            "installed_templates_version": None,
            "required_templates_version": None,
            "python_version": "",
            "pytorch_version": model_management.torch_version,
            "embedded_python": False,
            "argv": ["main.py"],
        },
        "devices": [
            {
                "name": model_management.get_torch_device_name(device),
                "type": device.type,
                "index": device.index,
                "vram_total": total,
                "vram_free": free,
                "torch_vram_total": torch_total,
                "torch_vram_free": torch_free,
            }
        ],
    }
