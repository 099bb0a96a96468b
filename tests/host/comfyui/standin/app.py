"""Starts everything in ComfyUI's order: server, nodes, custom nodes, routes, worker thread, listening."""

import asyncio
import logging
import threading
from collections.abc import Callable

import nodes
from aiohttp import web
from server import PromptServer

from . import dynamic, worker

logger = logging.getLogger("standin")


async def serve(host: str, port: int, ready: Callable[[str], None]) -> None:
    """Runs until cancelled. `ready` gets the address once it answers."""
    dynamic.enable_if_wanted()
    server = PromptServer(asyncio.get_running_loop())
    nodes.init_builtin_nodes()
    for name, loaded in nodes.init_external_custom_nodes().items():
        logger.info("custom node %s: %s", name, "loaded" if loaded else "FAILED")
    server.add_routes()
    worker.hook_progress(server)
    threading.Thread(target=worker.work, args=(server.prompt_queue, server), name="worker", daemon=True).start()
    runner = web.AppRunner(server.app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    actual = runner.addresses[0][1]
    ready(f"http://{f'[{host}]' if ':' in host else host}:{actual}")
    try:
        await server.publish_loop()
    finally:
        await runner.cleanup()
