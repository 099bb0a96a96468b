"""Waits for prompts as a real client does: over the websocket, without asking again and again."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import aiohttp

SECONDS_TO_FINISH = 300.0


def history_of(url: str, prompt_id: str) -> dict[str, Any]:
    """The history entry of a queued prompt once it has ended, on a host or a real ComfyUI. Raises TimeoutError."""
    # in a thread of its own: Playwright's synchronous API keeps an event loop running in the caller's
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(_in_time(url, prompt_id))).result()


async def _in_time(url: str, prompt_id: str) -> dict[str, Any]:
    return await asyncio.wait_for(_history_of(url, prompt_id), SECONDS_TO_FINISH)


async def _history_of(url: str, prompt_id: str) -> dict[str, Any]:
    socket_url = urlsplit(url)._replace(scheme="ws").geturl().rstrip("/") + "/ws"
    async with aiohttp.ClientSession() as session, session.ws_connect(socket_url) as socket:
        while True:
            # asked only after the socket is open, so that an end between the two is not missed
            async with session.get(f"{url}/history/{prompt_id}") as answer:
                history = await answer.json()
            if prompt_id in history:
                return history[prompt_id]
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT and message.json().get("type") == "status":
                    break
