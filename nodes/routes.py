"""REST: GET /v1/hardware/vram and POST /v1/hardware/vram/check, also below /api."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, Final, NamedTuple

from aiohttp import web

from ..vram.plan.prompt import PromptError
from ..vram.plan.report import check_report
from ..vram.status import status_report
from .pack import PATIENCE_S, Pack
from .preflight import MAX_PROMPT_BYTES, Preflight
from .requests import RequestError, check_same_site, limited_body, refusal

logger = logging.getLogger("vram_headroom")

STATUS_PATH: Final = "/v1/hardware/vram"
CHECK_PATH: Final = "/v1/hardware/vram/check"
OVERRIDE_PATH: Final = "/v1/hardware/vram/override"

TOO_LARGE: Final = f"a prompt of over {MAX_PROMPT_BYTES >> 20} MiB is not checked"


class Routes:
    """The handlers. Driver and disk are asked in a worker thread, never on ComfyUI's event loop."""

    def __init__(self, pack: Pack, preflight: Preflight) -> None:
        self._pack = pack
        self._preflight = preflight

    async def status(self, request: web.Request) -> web.Response:
        """What the cards, the pipelines and the host hold right now."""
        return web.json_response(await asyncio.to_thread(lambda: status_report(self._pack.status())))

    async def check(self, request: web.Request) -> web.Response:
        """Whether a prompt fits: the Plan as JSON, 400 for a body that is no prompt, 413 for one over 8 MiB.

        `"fixes": false` beside `prompt` leaves out the search for what would make it fit.
        """
        try:
            asked = _read_check(await limited_body(request, MAX_PROMPT_BYTES, TOO_LARGE))
            margin = self._pack.margin(request)
            if asked.fixes:
                plan, fixes = await self._pack.check_in_time(asked.prompt, asked.targets, margin)
            else:
                plan, fixes = await self._pack.plan_in_time(asked.prompt, asked.targets, margin), []
        except PromptError as error:
            return refusal(RequestError(400, "not_a_prompt", str(error)))
        except RequestError as error:
            return refusal(error)
        except (TimeoutError, asyncio.TimeoutError):
            return refusal(RequestError(503, "too_slow", f"no plan within {PATIENCE_S:g} s; is a model folder out of reach?"))
        except Exception:
            logger.exception("the memory check failed")
            return refusal(RequestError(500, "check_failed", "the check failed; ComfyUI's log says how"))
        return web.json_response(check_report(plan, fixes))

    async def override(self, request: web.Request) -> web.Response:
        """Let the next post of this prompt through although `enforce` would refuse it: 204. 403 from another site's page."""
        try:
            check_same_site(request)
            self._preflight.allow_once(_read_check(await limited_body(request, MAX_PROMPT_BYTES, TOO_LARGE)).prompt)
        except RequestError as error:
            return refusal(error)
        return web.Response(status=204)


class _Asked(NamedTuple):
    """What a check is asked about."""

    prompt: Any
    targets: list[str] | None = None
    """The output nodes asked for."""
    fixes: bool = True
    """False: the verdict alone, which takes a fraction of the time that looking for fixes does."""


def _read_check(raw: bytes) -> _Asked:
    """The prompt in a body, bare or wrapped, and what is asked of it. Raises RequestError 400."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "not_a_prompt", "the body is not a JSON object; send an API-format prompt")
    # in a bare prompt every value is a node; a wrapped one has the prompt under this name
    if "prompt" not in body or "class_type" in (body["prompt"] if isinstance(body["prompt"], dict) else {}):
        return _Asked(body)
    targets = body.get("partial_execution_targets")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise RequestError(400, "bad_targets", "partial_execution_targets is not a list of node ids")
    return _Asked(body["prompt"], targets, body.get("fixes") is not False)
