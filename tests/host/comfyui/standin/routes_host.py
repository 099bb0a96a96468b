"""/_host: what only a stand-in can offer: the card's books, other programs' memory, holding the worker, the journal."""

import asyncio
import sys
import threading
from typing import Any

from aiohttp import web
from comfy import model_management

from .card import card
from .dynamic import bytes_on_card, report
from .faults import Fault, faults
from .holds import Hold, holds
from .journal import journal

LONGEST_WAIT_S = 60.0


def add(routes: web.RouteTableDef, server: Any) -> None:
    @routes.get("/_host/card")
    async def books(request: web.Request) -> web.Response:
        the_card = card()
        if the_card is None:
            return web.json_response(None)
        bookings = [{"owner": booking.owner, "bytes": booking.nbytes} for booking in the_card.bookings]
        return web.json_response(
            {
                "name": the_card.name,
                "capacity": the_card.total_bytes,
                "used": the_card.used_bytes,
                "free": the_card.free_bytes,
                "booked": the_card.booked_bytes,
                "peak": the_card.peak_bytes,
                "bookings": bookings,
            }
        )

    @routes.post("/_host/others")
    async def others(request: web.Request) -> web.Response:
        the_card = card()
        if the_card is None:
            return web.json_response({"error": "there is no card"}, status=409)
        the_card.set_others(int((await request.json())["bytes"]))
        return web.json_response({"free": the_card.free_bytes})

    @routes.get("/_host/loaded")
    async def loaded(request: web.Request) -> web.Response:
        entries = [entry for entry in model_management.current_loaded_models if entry.model is not None]
        return web.json_response(
            [
                {
                    "name": entry.model.model.__class__.__name__,
                    "file": entry.model.model.file.name,
                    "bytes": entry.model_memory(),
                    "bytes_on_card": bytes_on_card(entry.model),
                    "dynamic": entry.model.is_dynamic(),
                }
                for entry in entries
            ]
        )

    @routes.get("/_host/pages")
    async def pages(request: web.Request) -> web.Response:
        """comfy-aimdo's books; null without DynamicVRAM."""
        return web.json_response(report())

    @routes.post("/_host/hold")
    async def hold(request: web.Request) -> web.Response:
        body = await request.json()
        holds.ask(Hold(str(body["node_id"]), body.get("step")))
        return web.json_response({})

    @routes.get("/_host/held")
    async def held(request: web.Request) -> web.Response:
        seconds = _seconds(request)
        found = await asyncio.get_running_loop().run_in_executor(None, holds.wait_until_held, seconds)
        if found is None:
            return web.json_response({"error": f"the worker was not held within {seconds:g} s"}, status=408)
        return web.json_response({"node_id": found.node_id, "step": found.step})

    @routes.post("/_host/release")
    async def release(request: web.Request) -> web.Response:
        holds.release()
        return web.json_response({})

    @routes.post("/_host/faults")
    async def fail(request: web.Request) -> web.Response:
        """Memory will run out as the list says, counted from now on; an empty one takes back what was asked before."""
        faults.ask(*(Fault(**one) for one in await request.json()))
        return web.json_response({})

    @routes.get("/_host/idle")
    async def idle(request: web.Request) -> web.Response:
        """Answers once the worker has nothing left to do, flags such as /free included."""
        seconds = _seconds(request)
        done = await asyncio.get_running_loop().run_in_executor(None, server.prompt_queue.wait_until_idle, seconds)
        return web.json_response({"idle": done}, status=200 if done else 408)

    @routes.get("/_host/log")
    async def log(request: web.Request) -> web.Response:
        entries = journal.since(int(request.query.get("since", 0)))
        return web.json_response([entry._asdict() for entry in entries])

    @routes.post("/_host/log/clear")
    async def clear(request: web.Request) -> web.Response:
        journal.clear()
        return web.json_response({})

    @routes.get("/_host/threads")
    async def threads(request: web.Request) -> web.Response:
        return web.json_response([thread.name for thread in threading.enumerate()])

    @routes.get("/_host/python")
    async def python(request: web.Request) -> web.Response:
        """Where this process imports from."""
        return web.json_response({"path": sys.path, "nodes": sys.modules["nodes"].__file__})


def _seconds(request: web.Request) -> float:
    return min(LONGEST_WAIT_S, float(request.query.get("timeout", LONGEST_WAIT_S)))
