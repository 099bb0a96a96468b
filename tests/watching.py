"""A browser that watches: a real websocket beside a real HTTP client, on a host or a real ComfyUI."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp

STATUS = "/api/v1/hardware/vram"
SECONDS = 60.0
HEARTBEAT_S = 10.0
"""As docs/events.md has it."""


class Reply(NamedTuple):
    status: int
    body: Any


class Page:
    """One page. Everything it is told is kept in `told`, in order."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, client_id: str) -> None:
        self.client_id = client_id
        self.told: list[tuple[str, Any]] = []
        self._session = session
        self._socket = socket
        self._came = asyncio.Condition()
        self._beats: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                said = message.json()
                async with self._came:
                    self.told.append((said["type"], said["data"]))
                    self._came.notify_all()

    def events(self, name: str) -> list[Any]:
        """What it was told under `vram_headroom.name`."""
        return [data for kind, data in self.told if kind == f"vram_headroom.{name}"]

    def ours(self) -> list[str]:
        return [kind for kind, _ in self.told if kind.startswith("vram_headroom.")]

    async def until(self, holds: Callable[[], Any]) -> Any:
        """Wait for messages until this is true; what it then is. Raises TimeoutError."""
        async with self._came:
            await asyncio.wait_for(self._came.wait_for(lambda: bool(holds())), SECONDS)
        return holds()

    async def get(self, path: str) -> Reply:
        async with self._session.get(path) as answer:
            return Reply(answer.status, await answer.json())

    async def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        async with self._session.post(path, json={} if body is None else body, headers=headers) as answer:
            text = await answer.text()
            return Reply(answer.status, await answer.json() if text else None)

    async def watch(self, watching: bool = True) -> Reply:
        """Begin to watch, or end it; once begun it goes on by itself, as a page's does."""
        if watching and self._beats is None:
            self._beats = asyncio.create_task(self._beat())
        elif not watching:
            self.close()
        return await self._watch(watching)

    async def _watch(self, watching: bool) -> Reply:
        return await self.post(f"{STATUS}/watch", {"client_id": self.client_id, "watching": watching})

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._watch(True)

    @property
    def watches(self) -> bool:
        return self._beats is not None

    def close(self) -> None:
        if self._beats is not None:
            self._beats.cancel()
            self._beats = None

    async def act(self, action: str, key: int | None = None) -> Reply:
        return await self.post(f"{STATUS}/{action}", {} if key is None else {"key": key})

    async def status(self) -> Any:
        return (await self.get(STATUS)).body

    async def queue(self, prompt: Any) -> str:
        """Raises AssertionError where it is refused."""
        answer = await self.post("/api/prompt", {"prompt": prompt, "client_id": self.client_id})
        assert answer.status == 200, answer.body
        return answer.body["prompt_id"]

    async def ended(self, prompt_id: str) -> None:
        """Until ComfyUI says that nothing of it runs."""
        await self.until(
            lambda: any(
                kind == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id for kind, data in self.told
            )
        )


def browse(url: str, visit: Callable[[Page], Awaitable[None]], client_id: str | None = None, says_goodbye: bool = True) -> None:
    """Open a page on `url` and run `visit` with it. Without `says_goodbye` it is gone as in a crash."""

    async def open_page() -> None:
        name = client_id or uuid.uuid4().hex
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        async with (
            aiohttp.ClientSession(url, timeout=timeout) as session,
            session.ws_connect("/ws", params={"clientId": name}) as socket,
        ):
            page = Page(session, socket, name)
            listening = asyncio.create_task(page.listen())
            try:
                await visit(page)
            finally:
                if says_goodbye and page.watches:
                    await page.watch(False)
                page.close()
                listening.cancel()

    asyncio.run(open_page())
