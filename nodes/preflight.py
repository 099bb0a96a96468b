"""The pre-queue hook: plans every prompt before ComfyUI validates it, says the verdict and, if that is wanted, enforces it.

The middleware plans in a worker thread, since the prompt handler runs on the event loop; the handler then finds the Plan in a
context variable. Only `enforce` refuses a prompt, only one that is known not to fit, and anybody can override it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal

from aiohttp import web

from ..vram.plan.cache import Bounded, content_key
from ..vram.plan.planner import say_shortage
from ..vram.plan.types import Plan
from .host.execution import PromptSpan
from .host.server import Handler
from .pack import PATIENCE_S, Pack

logger = logging.getLogger("vram_headroom")

MAX_PROMPT_BYTES: Final = 8 << 20
"""Larger bodies are not planned: the largest of 32 official WAN prompts has 22 KB."""

EXTRA_DATA_KEY: Final = "vram_headroom"

MODE_SETTING: Final = "VRAMHeadroom.AskBeforeQueueing"
"""The setting in ComfyUI's settings dialog (web/settings.js)."""

MODE_VARIABLE: Final = "VRAM_HEADROOM_MODE"
"""Environment variable for servers without a browser; it goes before the setting."""

OVERRIDE_HEADER: Final = "VRAM-Headroom-Override"

OVERRIDES_KEPT: Final = 64

Mode = Literal["off", "warn", "enforce"]

_plan: ContextVar[Plan | None] = ContextVar("vram_headroom_plan", default=None)


class Preflight:
    """Plans prompts as they are posted."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._overrides: Bounded[bool] = Bounded(OVERRIDES_KEPT)

    def allow_once(self, prompt: object) -> None:
        """Let the next post of this prompt through, whatever its plan says. Raises ValueError if it is no JSON."""
        self._overrides.put(content_key(prompt), True)

    async def around_post(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The middleware: leave a Plan for the prompt handler, then let ComfyUI do what it would have done."""
        mode = self._mode(request)
        body = await self._body(request) if mode != "off" else None
        plan = await self._try_plan(request, body) if body is not None else None
        if plan is not None and body is not None and mode == "enforce" and plan.verdict == "does_not_fit":
            if not self._overridden(request, body):
                logger.warning("refused: %s", plan.message)
                return web.json_response(refusal(plan, body["prompt"]), status=400)
            logger.warning("queued by override: %s", plan.message)
        token = _plan.set(plan)
        try:
            response = await handler(request)
        finally:
            _plan.reset(token)
        if plan is not None and (prompt_id := _prompt_id(response)):
            self._pack.plans.put(prompt_id, plan)
        return response

    def _mode(self, request: web.Request) -> Mode:
        found = os.environ.get(MODE_VARIABLE) or self._setting(request)
        return "off" if found == "off" else "enforce" if found == "enforce" else "warn"

    def _setting(self, request: web.Request) -> object:
        try:
            return self._pack.host.server.setting(request, MODE_SETTING)
        except Exception:
            logger.exception("the settings can't be read; prompts that do not fit are queued with a warning")
            return None

    async def _body(self, request: web.Request) -> dict[str, Any] | None:
        """The body, if it is a prompt that is small enough to be planned; of anything else ComfyUI says what it is."""
        if (request.content_length or 0) > MAX_PROMPT_BYTES:
            return None
        try:
            # aiohttp keeps the body it read, so ComfyUI reads the same one again
            body = await request.json()
        except (ValueError, RecursionError):
            return None
        return body if isinstance(body, dict) and isinstance(body.get("prompt"), dict) else None

    async def _try_plan(self, request: web.Request, body: Mapping[str, Any]) -> Plan | None:
        try:
            # ComfyUI puts a prompt before those that wait where this is true in any sense (server.py, post_prompt)
            front = bool(body.get("front"))
            return await self._pack.plan_in_time(body["prompt"], _targets(body), self._pack.margin(request), front)
        except ValueError:
            # no prompt: ComfyUI says so itself
            return None
        except (TimeoutError, asyncio.TimeoutError):
            logger.warning("the memory check took longer than %g s; the prompt is queued unchecked", PATIENCE_S)
            return None
        except Exception:
            # a fault of the check must never cost a person their prompt
            logger.exception("the memory check failed; the prompt is queued unchecked")
            return None

    def _overridden(self, request: web.Request, body: Mapping[str, Any]) -> bool:
        if request.headers.get(OVERRIDE_HEADER, "").strip().lower() in ("1", "true", "yes"):
            return True
        extra_data = body.get("extra_data")
        ours = extra_data.get(EXTRA_DATA_KEY) if isinstance(extra_data, dict) else None
        if isinstance(ours, dict) and ours.get("override") is True:
            return True
        return self._overrides.pop(content_key(body["prompt"])) is True

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

    def prompt_started(self, span: PromptSpan) -> None:
        """Plan a prompt again as it starts: the card is seldom what it was when it was queued. Worker thread only."""
        before = self._pack.plans.get(span.prompt_id)
        if before is None or before.settled:
            return  # it was not checked when it was queued and nobody waits for its plan, or there can be no other
        plan = self._pack.plan_now(span.prompt, span.outputs)
        self._pack.plans.put(span.prompt_id, plan)
        if plan.verdict == "does_not_fit" and before.runs:
            logger.warning("since it was queued less memory has become free. %s", plan.message)

    def prompt_ended(self, span: PromptSpan) -> None: ...


def refusal(plan: Plan, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A refused prompt in ComfyUI's own error shape: numbers for API clients on top, and on each node to blame for the canvas.

    `custom_validation_failed` is the node error whose details every front end shows (ComfyUI execution.py, validate_inputs).
    """
    blamed = {planned.phase.node_id: planned for planned in plan.phases if planned.short and planned.phase.node_id in prompt}
    node_errors = {
        node_id: {
            "errors": [
                {
                    "type": "custom_validation_failed",
                    "message": "Does not fit this card",
                    "details": say_shortage(planned, plan.card),
                    "extra_info": {"short_bytes": planned.short},
                }
            ],
            "dependent_outputs": [],
            "class_type": planned.phase.class_type,
        }
        for node_id, planned in blamed.items()
    }
    error = {
        "type": "prompt_outputs_failed_validation",
        "message": plan.message,
        "details": f"To queue it all the same: extra_data.{EXTRA_DATA_KEY}.override = true, or header {OVERRIDE_HEADER}: true.",
        "extra_info": {EXTRA_DATA_KEY: {"plan_id": plan.plan_id, "verdict": plan.verdict}},
    }
    return {"error": error, "node_errors": node_errors}


def _prompt_id(response: web.StreamResponse) -> str | None:
    """The id ComfyUI gave to the prompt it queued."""
    if response.status != 200 or not isinstance(response, web.Response) or not isinstance(response.body, bytes):
        return None
    try:
        answer = json.loads(response.body)
    except ValueError:
        return None
    found = answer.get("prompt_id") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None


def _targets(body: Mapping[str, Any]) -> list[str] | None:
    """Output nodes to run, if the client asked for some only."""
    targets = body.get("partial_execution_targets")
    return [str(target) for target in targets] if isinstance(targets, list) else None
