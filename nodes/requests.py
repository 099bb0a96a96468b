"""What every route needs: bodies read within bounds, pages of other sites refused, errors as JSON."""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web

SMALL_BODY: Final = 1 << 14
"""Bytes of a body that is no prompt: a key or a client's id."""


class RequestError(ValueError):
    """A request that can't be answered: the HTTP status, a machine's word and a person's sentence."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


def check_same_site(request: web.Request) -> None:
    """Refuses what a page of another site sends through a person's browser. Raises RequestError 403."""
    origin = request.headers.get("Origin")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("Host")
    if foreign or request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        raise RequestError(403, "other_site", "this can only be asked by ComfyUI's own page or by a script")


async def limited_body(request: web.Request, most: int, too_large: str) -> bytes:
    """The body, read no further than `most` bytes. Raises RequestError 413 with this sentence."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > most:
            raise RequestError(413, "too_large", too_large)
    return bytes(body)


async def json_object(request: web.Request) -> dict[str, Any]:
    """The small JSON object in a body; an empty body is an empty one. Raises RequestError 400 and 413."""
    raw = await limited_body(request, SMALL_BODY, f"a body of over {SMALL_BODY >> 10} KiB is not read here")
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "not_an_object", "the body is not a JSON object")
    return body


def refusal(error: RequestError) -> web.Response:
    return web.json_response({"error": {"type": error.kind, "message": str(error)}}, status=error.status)
