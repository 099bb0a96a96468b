"""The ComfyUI side: thin nodes, routes and hooks over the engine in `vram`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Offer(NamedTuple):
    """What ComfyUI asks of a custom node's module."""

    classes: dict[str, Any]
    names: dict[str, str]
    web: str | None


def connect() -> Offer:
    """Wire the pack into the running ComfyUI, once; a second copy of it in another folder offers nothing."""
    from ..vram.monitor import get_vram_monitor
    from ..vram.offloader import get_vram_offloader
    from . import controls, decoding, loaders, panel_routes
    from .actions import Actions
    from .events import Events
    from .host import connect as connect_host
    from .lifecycle import Lifecycle
    from .pack import Pack
    from .preflight import Preflight
    from .recovery import Recovery
    from .routes import CHECK_PATH, OVERRIDE_PATH, STATUS_PATH, Routes

    host = connect_host(str(Path(__file__).absolute().parent.parent))
    if host is None:
        return Offer({}, {}, None)
    monitor = get_vram_monitor()
    offloader = get_vram_offloader()
    monitor.connect(host.models.accelerators, lambda index: host.models.reclaimable(index, offloader.pinned_keys(index)))
    offloader.interrupts = host.models.interrupts()
    pack = Pack(host, monitor, offloader)
    loaders.RegisteringLoader.pack = loaders.LoadPipeline.pack = controls.Control.pack = pack
    preflight = Preflight(pack)
    routes = Routes(pack, preflight)
    host.server.add_route("GET", STATUS_PATH, routes.status)
    host.server.add_route("POST", CHECK_PATH, routes.check)
    host.server.add_route("POST", OVERRIDE_PATH, routes.override)
    host.server.around_prompt_posts(preflight.around_post)
    host.server.on_prompt(preflight.on_prompt)
    # the plan is made anew before anything asks for it
    host.execution.watch(preflight)
    controls.Control.lifecycle = lifecycle = Lifecycle(pack)
    Recovery(pack)
    events = Events(pack, lifecycle)
    panel_routes.add(host.server, panel_routes.PanelRoutes(events, Actions(pack, events.changed)))
    return Offer(
        {**loaders.NODE_CLASSES, **controls.NODE_CLASSES, **decoding.NODE_CLASSES},
        {**loaders.NODE_NAMES, **controls.NODE_NAMES, **decoding.NODE_NAMES},
        "./web",
    )
