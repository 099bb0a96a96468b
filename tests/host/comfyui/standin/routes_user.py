"""One user's settings and files, and pictures in and out."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import folder_paths
from aiohttp import web

SETTINGS: dict[str, Any] = {
    # Without these the front end opens its first-run tour.
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.58.1",
    # The front end shows the whole workflow, and by default leaves its words out where they get small.
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}


class AppSettings:
    """`PromptServer.user_manager.settings`, for the one user there is."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = dict(SETTINGS)

    def get_settings(self, request: web.Request) -> dict[str, Any]:
        return self.values


class UserManager:
    def __init__(self) -> None:
        self.settings = AppSettings()


def add(routes: web.RouteTableDef, values: dict[str, Any]) -> None:

    @routes.get("/users")
    async def users(request: web.Request) -> web.Response:
        return web.json_response({"storage": "server", "migrated": True})

    @routes.get("/settings")
    async def get_settings(request: web.Request) -> web.Response:
        return web.json_response(values)

    @routes.get("/settings/{id}")
    async def get_setting(request: web.Request) -> web.Response:
        return web.json_response(values.get(request.match_info["id"]))

    @routes.post("/settings")
    async def post_settings(request: web.Request) -> web.Response:
        values.update(await request.json())
        return web.Response(status=200)

    @routes.post("/settings/{id}")
    async def post_setting(request: web.Request) -> web.Response:
        values[request.match_info["id"]] = await request.json()
        return web.Response(status=200)

    @routes.get("/userdata")
    async def list_files(request: web.Request) -> web.Response:
        return _listing(request)

    @routes.get("/userdata/{file}")
    async def get_file(request: web.Request) -> web.StreamResponse:
        path = _user_path(request.match_info["file"])
        return web.FileResponse(path) if path is not None and path.is_file() else web.Response(status=404)

    @routes.post("/userdata/{file}")
    async def post_file(request: web.Request) -> web.Response:
        path = _user_path(request.match_info["file"])
        if path is None:
            return web.Response(status=403)
        if path.exists() and request.query.get("overwrite", "true") == "false":
            return web.Response(status=409, text="File already exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(await request.read())
        return _answer(path, request)

    @routes.delete("/userdata/{file}")
    async def delete_file(request: web.Request) -> web.Response:
        path = _user_path(request.match_info["file"])
        if path is None or not path.is_file():
            return web.Response(status=404)
        path.unlink()
        return web.Response(status=204)

    @routes.post("/userdata/{file}/move/{dest}")
    async def move_file(request: web.Request) -> web.Response:
        source, target = _user_path(request.match_info["file"]), _user_path(request.match_info["dest"])
        if source is None or target is None or not source.is_file():
            return web.Response(status=404)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return _answer(target, request)

    @routes.get("/view")
    async def view(request: web.Request) -> web.StreamResponse:
        name, folder = folder_paths.annotated_filepath(request.query.get("filename", ""))
        folder = folder or folder_paths.get_directory_by_type(request.query.get("type", "output"))
        if not name or ".." in name or name.startswith("/") or folder is None:
            return web.Response(status=400)
        inside = os.path.abspath(os.path.join(folder, request.query.get("subfolder", ""), os.path.basename(name)))
        if os.path.commonpath((inside, folder)) != folder:
            return web.Response(status=403)
        return web.FileResponse(inside) if os.path.isfile(inside) else web.Response(status=404)

    @routes.post("/upload/image")
    async def upload(request: web.Request) -> web.Response:
        return _save_upload(await request.post())


def _user_path(name: str) -> Path | None:
    root = Path(folder_paths.get_user_directory(), "default").resolve()
    path = (root / unquote(name)).resolve()
    return path if path.is_relative_to(root) else None


def _answer(path: Path, request: web.Request) -> web.Response:
    root = Path(folder_paths.get_user_directory(), "default").resolve()
    name = path.relative_to(root).as_posix()
    return web.json_response(_info(path, name) if request.query.get("full_info") == "true" else name)


def _info(path: Path, name: str) -> dict[str, Any]:
    stat = path.stat()
    modified = int(stat.st_mtime * 1000)
    return {"path": name, "size": stat.st_size, "modified": modified, "created": modified}


def _listing(request: web.Request) -> web.Response:
    directory = request.query.get("dir", "")
    folder = _user_path(directory) if directory else None
    if folder is None:
        return web.Response(status=400, text="Directory not provided")
    if not folder.is_dir():
        return web.Response(status=404, text="Directory not found")
    found = folder.rglob("*") if request.query.get("recurse") == "true" else folder.glob("*")
    full, split = request.query.get("full_info") == "true", request.query.get("split") == "true"
    names: list[Any] = []
    for path in sorted(one for one in found if one.is_file()):
        name = path.relative_to(folder).as_posix()
        names.append(_info(path, name) if full else [name, *name.split("/")] if split else name)
    return web.json_response(names)


def _save_upload(post: Any) -> web.Response:
    image = post.get("image")
    if not isinstance(image, web.FileField):
        return web.Response(status=400)
    kind = post.get("type") or "input"
    root = folder_paths.get_directory_by_type(kind) or folder_paths.get_input_directory()
    subfolder = os.path.normpath(post.get("subfolder", "") or ".")
    folder = Path(root, subfolder).resolve()
    if not folder.is_relative_to(Path(root).resolve()):
        return web.Response(status=400)
    folder.mkdir(parents=True, exist_ok=True)
    name = os.path.basename(image.filename)
    (folder / name).write_bytes(image.file.read())
    return web.json_response({"name": name, "subfolder": "" if subfolder == "." else subfolder, "type": kind})
