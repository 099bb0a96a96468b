"""Plays a list of scenarios against a running ComfyUI, or the stand-in, that has the probe pack, and returns what happened.

The recorder and the fidelity test both call `replay`, so a difference between their results is a difference between the hosts.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import aiohttp

Mode = Literal["run", "refuse", "interrupt", "oom"]
Prompt = dict[str, dict[str, Any]]
FINISHED = "ws executing -"


class Scenario(NamedTuple):
    name: str
    prompt: str | None  # None: a body without a prompt
    mode: Mode = "run"
    fresh: bool = True  # models unloaded and cached outputs forgotten before it
    targets: tuple[str, ...] | None = None  # partial_execution_targets


class Played(NamedTuple):
    status: int
    answer: Any
    history: Any
    events: list[str]


class Session(NamedTuple):
    keys: dict[str, list[str]]  # message type -> the sets of keys its data came with
    played: dict[str, Played]


def scenario_from_json(name: str, data: Mapping[str, Any]) -> Scenario:
    mode = data["mode"]
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r} in scenario {name!r}")
    targets = data.get("targets")
    return Scenario(name, data["prompt"], mode, data["fresh"], None if targets is None else tuple(targets))


async def replay(url: str, prompts: Mapping[str, Prompt], scenarios: list[Scenario]) -> Session:
    """Play the scenarios in order, each with a client of its own."""
    keys: dict[str, set[str]] = {}
    played: dict[str, Played] = {}
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=60)) as http:
        for scenario in scenarios:
            if scenario.fresh:
                await _freshen(http)
            result, seen = await _play(http, scenario, prompts)
            played[scenario.name] = result
            for name, sets in seen.items():
                keys.setdefault(name, set()).update(sets)
    return Session({name: sorted(sets) for name, sets in sorted(keys.items())}, played)


async def _freshen(http: aiohttp.ClientSession) -> None:
    await _post(http, "/probe/reset")
    await _post(http, "/free", {"unload_models": True, "free_memory": True})
    await _events(http, until="reset_executor")


async def _play(
    http: aiohttp.ClientSession, scenario: Scenario, prompts: Mapping[str, Prompt]
) -> tuple[Played, dict[str, list[str]]]:
    client_id = uuid.uuid4().hex
    body: dict[str, Any] = {"client_id": client_id}
    if scenario.prompt is not None:
        body["prompt"] = prompts[scenario.prompt]
    if scenario.targets is not None:
        body["partial_execution_targets"] = list(scenario.targets)
    async with http.ws_connect("/ws", params={"clientId": client_id}) as socket:
        await socket.receive_json()  # the status a new client is sent
        await _post(http, "/probe/reset")
        if scenario.mode == "oom":
            await _post(http, "/probe/oom")
        at = f"ws progress {_sampler(body['prompt'])} 1/" if scenario.mode == "interrupt" else None
        if at is not None:
            await _post(http, "/probe/hold", {"at": at})
        async with http.post("/prompt", json=body) as response:
            status, answer = response.status, await response.json()
        if at is not None:
            await _events(http, until=at)
            await _post(http, "/interrupt")
            await _post(http, "/probe/release")
        recorded = await _events(http, until=FINISHED if status == 200 else None)
        events: list[str] = recorded["events"]
        await _expect_messages(socket, [event.split()[1] for event in events if event.startswith(("ws ", "all "))])
    history = await _history(http, answer["prompt_id"]) if status == 200 else None
    return Played(status, shape_of_answer(answer), history, events), recorded["keys"]


async def _expect_messages(socket: aiohttp.ClientWebSocketResponse, expected: list[str]) -> None:
    """The client must have been sent what the host says it sent, in that order."""
    received: list[str] = []
    while len(received) < len(expected):
        message = await socket.receive()
        if message.type == aiohttp.WSMsgType.TEXT:
            received.append(json.loads(message.data)["type"])
        elif message.type != aiohttp.WSMsgType.BINARY:
            break
    if received != expected:
        raise AssertionError(f"the host sent {expected}, the client received {received}")


async def _history(http: aiohttp.ClientSession, prompt_id: str) -> dict[str, Any]:
    async with http.get(f"/history/{prompt_id}") as response:
        entry = (await response.json())[prompt_id]
    return {
        "keys": sorted(entry),
        "outputs": {node: sorted(output) for node, output in entry["outputs"].items()},
        "status_str": entry["status"]["status_str"],
        "completed": entry["status"]["completed"],
        "messages": [name for name, _ in entry["status"]["messages"]],
    }


async def _events(http: aiohttp.ClientSession, until: str | None = None) -> dict[str, Any]:
    async with http.get("/probe/events", params={} if until is None else {"until": until}) as response:
        response.raise_for_status()
        return await response.json()


async def _post(http: aiohttp.ClientSession, path: str, body: Mapping[str, Any] | None = None) -> None:
    async with http.post(path, json=body or {}) as response:
        response.raise_for_status()


def _sampler(prompt: Prompt) -> str:
    return next(node for node, data in prompt.items() if data["class_type"].startswith("KSampler"))


def shape_of_answer(answer: Any) -> Any:
    """An answer without its prose and its ids: types, keys, and which nodes are blamed for what."""
    if answer.get("prompt_id"):
        return {"keys": sorted(answer), "node_errors": _shape_of_node_errors(answer["node_errors"])}
    error = answer["error"]
    return {
        "keys": sorted(answer),
        "error": {"type": error["type"], "keys": sorted(error), "extra_info": sorted(error["extra_info"])},
        "node_errors": _shape_of_node_errors(answer["node_errors"]),
    }


def _shape_of_node_errors(node_errors: Any) -> Any:
    if not isinstance(node_errors, dict):
        return node_errors
    return {
        node: {
            "keys": sorted(told),
            "class_type": told["class_type"],
            "dependent_outputs": sorted(told["dependent_outputs"]),
            "errors": [
                {"type": error["type"], "keys": sorted(error), "extra_info": sorted(error["extra_info"])}
                for error in told["errors"]
            ],
        }
        for node, told in sorted(node_errors.items())
    }


def replay_now(url: str, prompts: Mapping[str, Prompt], scenarios: list[Scenario]) -> Session:
    return asyncio.run(replay(url, prompts, scenarios))
