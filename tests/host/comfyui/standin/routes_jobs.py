"""The queue, the history, the same two as jobs, and the buttons that stop and free."""

import json
import uuid
from typing import Any

import nodes
from aiohttp import web

STATES = ("pending", "in_progress", "completed", "failed", "cancelled")
MEDIA = {"images", "video", "audio", "3d", "text"}


def add(routes: web.RouteTableDef, server: Any) -> None:
    queue = server.prompt_queue

    @routes.get("/queue")
    async def get_queue(request: web.Request) -> web.Response:
        running, pending = queue.get_current_queue_volatile()
        return web.json_response(
            {"queue_running": [item[:5] for item in running], "queue_pending": [item[:5] for item in pending]}
        )

    @routes.post("/queue")
    async def post_queue(request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            queue.wipe_queue()
        for prompt_id in body.get("delete", []):
            queue.delete_queue_item(lambda item, wanted=prompt_id: item[1] == wanted)
        return web.Response(status=200)

    @routes.get("/history")
    async def get_history(request: web.Request) -> web.Response:
        most, offset = request.query.get("max_items"), request.query.get("offset", "-1")
        return web.json_response(queue.get_history(max_items=int(most) if most else None, offset=int(offset)))

    @routes.get("/history/{prompt_id}")
    async def get_history_of(request: web.Request) -> web.Response:
        return web.json_response(queue.get_history(prompt_id=request.match_info["prompt_id"]))

    @routes.post("/history")
    async def post_history(request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            queue.wipe_history()
        for prompt_id in body.get("delete", []):
            queue.delete_history_item(prompt_id)
        return web.Response(status=200)

    @routes.post("/interrupt")
    async def interrupt(request: web.Request) -> web.Response:
        try:
            prompt_id = (await request.json()).get("prompt_id")
        except json.JSONDecodeError:
            prompt_id = None
        if prompt_id:
            queue.interrupt_if_running(prompt_id)
        else:
            nodes.interrupt_processing()
        return web.Response(status=200)

    @routes.post("/free")
    async def free(request: web.Request) -> web.Response:
        body = await request.json()
        for flag in ("unload_models", "free_memory"):
            if body.get(flag):
                queue.set_flag(flag, True)
        return web.Response(status=200)

    @routes.get("/jobs")
    async def jobs(request: web.Request) -> web.Response:
        return _jobs(request, queue)

    @routes.get("/jobs/{job_id}")
    async def job(request: web.Request) -> web.Response:
        found = [one for one in _all_jobs(queue, outputs=True) if one["id"] == request.match_info["job_id"]]
        return web.json_response(found[0]) if found else web.json_response({"error": "Job not found"}, status=404)

    def cancel(job_id: str) -> bool:
        return queue.interrupt_if_running(job_id) or queue.delete_queue_item(lambda item: item[1] == job_id)

    @routes.post("/jobs/{job_id}/cancel")
    async def cancel_one(request: web.Request) -> web.Response:
        return web.json_response({"cancelled": cancel(request.match_info["job_id"])})

    @routes.post("/jobs/cancel")
    async def cancel_several(request: web.Request) -> web.Response:
        ids = (await request.json()).get("job_ids")
        if not isinstance(ids, list):
            return web.json_response({"error": "job_ids must be a list"}, status=400)
        wrong = [str(one) for one in ids if not _is_uuid(one)]
        if wrong:
            error = {"error": "job_ids contains invalid id(s)", "invalid_ids": wrong}
            return web.json_response(error, status=400)
        done = [cancel(one) for one in ids]
        return web.json_response({"cancelled": any(done)})


def _is_uuid(value: Any) -> bool:
    try:
        return str(uuid.UUID(value)) == value
    except (ValueError, AttributeError, TypeError):
        return False


def _jobs(request: web.Request, queue: Any) -> web.Response:
    wanted = [state.strip() for state in request.query.get("status", "").lower().split(",") if state.strip()]
    wrong = [state for state in wanted if state not in STATES]
    if wrong:
        error = f"Invalid status value(s): {', '.join(wrong)}. Valid values: {', '.join(STATES)}"
        return web.json_response({"error": error}, status=400)
    found = [job for job in _all_jobs(queue) if not wanted or job["status"] in wanted]
    newest_first = request.query.get("sort_order", "desc") != "asc"
    found.sort(key=lambda job: job.get("create_time", 0), reverse=newest_first)
    offset = max(0, int(request.query.get("offset", 0)))
    limit = int(request.query["limit"]) if "limit" in request.query else None
    page = found[offset:] if limit is None else found[offset : offset + limit]
    pagination = {
        "offset": offset,
        "limit": limit,
        "total": len(found),
        "has_more": offset + len(page) < len(found),
    }
    return web.json_response({"jobs": page, "pagination": pagination})


def _all_jobs(queue: Any, outputs: bool = False) -> list[dict[str, Any]]:
    running, pending = queue.get_current_queue_volatile()
    jobs = [_waiting(item, "in_progress") for item in running] + [_waiting(item, "pending") for item in pending]
    return jobs + [_done(prompt_id, entry, outputs) for prompt_id, entry in queue.get_history().items()]


def _common(item: Any) -> dict[str, Any]:
    workflow = item[3].get("extra_pnginfo", {}).get("workflow", {})
    values = {"create_time": item[3].get("create_time"), "workflow_id": workflow.get("id")}
    return {"id": item[1], "priority": item[0]} | {key: value for key, value in values.items() if value is not None}


def _waiting(item: Any, status: str) -> dict[str, Any]:
    return _common(item) | {"status": status, "outputs_count": 0, "previewable_outputs_count": 0}


def _done(prompt_id: str, entry: dict[str, Any], outputs: bool) -> dict[str, Any]:
    status = entry["status"] or {}
    times = {event: data.get("timestamp") for event, data in status.get("messages", [])}
    error = next((data for event, data in status.get("messages", []) if event == "execution_error"), None)
    interrupted = "execution_interrupted" in times
    state = "completed" if status.get("completed") else "cancelled" if interrupted else "failed"
    shown = [
        item | {"nodeId": node_id, "mediaType": kind}
        for node_id, kinds in entry["outputs"].items()
        for kind, items in kinds.items()
        if kind in MEDIA
        for item in items
        if isinstance(item, dict)
    ]
    ended = ("execution_success", "execution_error", "execution_interrupted")
    values = {
        "execution_start_time": times.get("execution_start"),
        "execution_end_time": next((times[event] for event in ended if event in times), None),
        "execution_error": error,
        "preview_output": next((item for item in shown if item.get("type") == "output"), shown[0] if shown else None),
    }
    job = _common(entry["prompt"]) | {"id": prompt_id, "status": state}
    job |= {"outputs_count": len(shown), "previewable_outputs_count": len(shown)}
    job |= {key: value for key, value in values.items() if value is not None}
    if outputs:
        workflow = {"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]}
        job |= {"outputs": entry["outputs"], "execution_status": status, "workflow": workflow}
    return job
