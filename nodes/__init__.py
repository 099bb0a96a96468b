"""The ComfyUI side: thin nodes, routes and hooks over the engine in `vram`."""

from __future__ import annotations

from typing import Any


def connect() -> tuple[dict[str, Any], dict[str, str]]:
    """Wire the pack into the running ComfyUI once; returns its node classes and their display names."""
    from ..vram.monitor import get_vram_monitor
    from ..vram.offloader import get_vram_offloader
    from .host import connect as connect_host
    from .loaders import NODE_CLASSES, NODE_NAMES, RegisteringLoader
    from .pack import Pack
    from .preflight import Preflight
    from .routes import CHECK_PATH, STATUS_PATH, Routes

    host = connect_host()
    monitor = get_vram_monitor()
    monitor.connect(host.models.accelerators, host.models.reclaimable)
    pack = Pack(host, monitor, get_vram_offloader())
    RegisteringLoader.pack = pack
    routes = Routes(pack)
    host.server.add_route("GET", STATUS_PATH, routes.status)
    host.server.add_route("POST", CHECK_PATH, routes.check)
    preflight = Preflight(pack)
    host.server.around_prompt_posts(preflight.around_post)
    host.server.on_prompt(preflight.on_prompt)
    return dict(NODE_CLASSES), dict(NODE_NAMES)
