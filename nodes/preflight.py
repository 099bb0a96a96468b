"""The pre-queue hook: plans every prompt before ComfyUI validates it, logs the verdict and attaches it to the prompt.

The middleware plans in a worker thread, since the prompt handler runs on the event loop; the handler then finds the Plan in a
context variable. Nothing here ever refuses a prompt or fails it.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from typing import Any, Final

from aiohttp import web

from ..vram.plan.types import Plan
from .host.server import Handler
from .pack import PATIENCE_S, Pack

logger = logging.getLogger("vram_headroom")

MAX_PROMPT_BYTES: Final = 8 << 20
"""Larger bodies are not planned: the largest of 32 official WAN prompts has 22 KB."""

EXTRA_DATA_KEY: Final = "vram_headroom"

_plan: ContextVar[Plan | None] = ContextVar("vram_headroom_plan", default=None)


class Preflight:
    """Plans prompts as they are posted."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack

    async def around_post(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The middleware: leave a Plan for the prompt handler, then let ComfyUI do what it would have done."""
        token = _plan.set(await self._try_plan(request))
        try:
            return await handler(request)
        finally:
            _plan.reset(token)

    async def _try_plan(self, request: web.Request) -> Plan | None:
        if (request.content_length or 0) > MAX_PROMPT_BYTES:
            return None
        try:
            # aiohttp keeps the body it read, so ComfyUI reads the same one again
            body = await request.json()
            if not isinstance(body, dict) or not isinstance(body.get("prompt"), dict):
                return None
            return await self._pack.plan_in_time(body["prompt"], _targets(body))
        except ValueError:
            # no prompt, or not JSON: ComfyUI says so itself
            return None
        except (TimeoutError, asyncio.TimeoutError):
            logger.warning("the memory check took longer than %g s; the prompt is queued unchecked", PATIENCE_S)
            return None
        except Exception:
            # a fault of the check must never cost a person their prompt
            logger.exception("the memory check failed; the prompt is queued unchecked")
            return None

    def on_prompt(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt handler: attach plan id and verdict to extra_data and log what a person should know. Never raises."""
        plan = _plan.get()
        if plan is None or not isinstance(body, dict):
            return body
        extra_data = body.setdefault("extra_data", {})
        if isinstance(extra_data, dict):
            extra_data[EXTRA_DATA_KEY] = {"plan_id": plan.plan_id, "verdict": plan.verdict, "fits": plan.runs}
        if plan.verdict == "does_not_fit":
            logger.warning("%s", plan.message)
        elif plan.verdict == "fits_with_offload":
            logger.info("%s", plan.message)
        return body


def _targets(body: dict[str, Any]) -> list[str] | None:
    """Output nodes to run, if the client asked for some only."""
    targets = body.get("partial_execution_targets")
    return [str(target) for target in targets] if isinstance(targets, list) else None
