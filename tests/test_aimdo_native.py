"""The simulated pages decide what the real comfy-aimdo decides.

The native library of each release, on a driver of paper, and the simulation take the same random calls, and after each of them
hold the same pages, pins, watermarks and bytes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run
import torch
from aimdo_native import State
from host.comfyui.standin.pages import PAGE_BYTES, Buffer, CardPages, PagesOfAModelError, Vbar
from vram_headroom.vram.device import SimulatedCard

TESTS = Path(__file__).resolve().parent
MIB = 2**20
CALLS = 120

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the libraries that are asked are those for Linux")

Scenario = dict[str, Any]


def random_scenario(seed: int) -> Scenario:
    """Up to three models, tensors, buffers and other programs on a card of 1 to 3 GiB: pressure most of the time."""
    rng = random.Random(seed)
    capacity = rng.choice([1024, 1536, 3072]) * MIB
    models: dict[str, int] = {}
    pinned: list[tuple[str, int, int]] = []
    tensors: list[str] = []
    buffers: set[str] = set()
    calls: list[list[Any]] = []
    for number in range(CALLS):
        what = rng.random()
        key = rng.choice(list(models)) if models else ""
        if not models or (what < 0.04 and len(models) < 3):
            key = f"model {number}"
            models[key] = rng.randint(1, 3 * capacity // 2)
            calls.append(["new", key, models[key]])
        elif what < 0.5:
            offset = rng.randrange(0, max(1, min(models[key], capacity) - 512), 512)
            nbytes = min(rng.choice([4096, 20 * MIB, 90 * MIB, 200 * MIB]), models[key] - offset)
            calls.append(["fault", key, offset, nbytes])
            pinned.append((key, offset, nbytes))
        elif what < 0.74:
            if pinned:
                calls.append(["unpin", *pinned.pop(rng.randrange(len(pinned)))])
        elif what < 0.78:
            calls.append([rng.choice(["prioritize", "prioritize", "deprioritize"]), key])
        elif what < 0.84:
            calls.append([rng.choice(["free", "limit", "watermark"]), key, rng.randint(0, models[key])])
        elif what < 0.86:
            calls.append(["reset"])
        elif what < 0.92:
            tensors.append(f"tensor {number}")
            size = rng.choice([100, 700_000, 1_500_000, 300 * MIB, 700 * MIB])
            calls.append(["tensor", tensors[-1], size])
        elif what < 0.95:
            if tensors:
                calls.append(["untensor", tensors.pop(rng.randrange(len(tensors)))])
        elif what < 0.965:
            buffers.add("buffer")
            calls.append(["buffer", "buffer", rng.randint(1, 200 * MIB)])
        elif what < 0.975:
            if buffers:
                calls.append(["unbuffer", buffers.pop()])
        elif what < 0.985:
            calls.append([rng.choice(["others", "headroom"]), rng.randint(0, capacity // 2)])
        elif what < 0.99 and len(models) > 1:
            del models[key]
            pinned = [entry for entry in pinned if entry[0] != key]
            calls.append(["drop", key])
        else:
            calls.append(["analyze"])
    others, extra = rng.choice([0, 0, 200 * MIB]), rng.choice([0, 0, 100 * MIB])
    return {"card": capacity, "others": others, "extra": extra, "calls": calls}


class Simulated:
    """The same calls on the simulation. Its clock stands still within a call and is past the poll interval at the next."""

    def __init__(self, scenario: Scenario) -> None:
        self.card = SimulatedCard(scenario["card"], scenario["others"])
        self.now = 0
        self.books = CardPages(self.card, scenario["extra"], clock=lambda: self.now)
        self.models: dict[str, Vbar] = {}
        self.tensors: dict[str, Any] = {}
        self.buffers: dict[str, Buffer] = {}

    def call(self, name: str, *arguments: Any) -> State:
        self.now += 2000
        result = self.act(name, *arguments)
        models = {key: (vbar.watermark, vbar.residency()) for key, vbar in self.models.items()}
        return State(result, self.books.total_usage, self.card.free_bytes, models)

    def act(self, name: str, key: Any = None, *numbers: int) -> Any:
        match name:
            case "new":
                self.models[key] = self.books.reserve(numbers[0])
                return len(self.models[key].pages)
            case "drop":
                self.books.forget(self.models.pop(key))
            case "fault":
                try:
                    serials = self.books.fault(self.models[key], *numbers)
                except PagesOfAModelError as error:
                    return f"Fault failed: {error.code}"
                return None if serials is None else [*serials, *[0] * (numbers[1] // PAGE_BYTES + 2 - len(serials))]
            case "unpin":
                self.books.unpin(self.models[key], *numbers)
            case "prioritize":
                self.books.prioritize(self.models[key])
            case "deprioritize":
                self.books.deprioritize(self.models[key])
            case "limit":
                self.books.set_watermark_limit(self.models[key], *numbers)
            case "watermark":
                self.books.set_watermark(self.models[key], *numbers)
            case "free":
                return self.books.free(self.models[key], *numbers)
            case "reset":
                self.books.reset_watermark_limits()
            case "analyze":
                return self.books.resident_bytes
            case "headroom":
                self.books.simple_headroom = key
            case "others":
                self.card.set_others(key)
            case "tensor":
                try:
                    self.tensors[key] = self.books.allocate(numbers[0], key)
                except torch.OutOfMemoryError:
                    return False
                return True
            case "untensor":
                if key in self.tensors:
                    self.books.release(self.tensors.pop(key))
            case "buffer":
                buffer = self.buffers.setdefault(key, Buffer(1 << 30, key))
                return self.books.grow(buffer, numbers[0])
            case "unbuffer":
                self.books.destroy(self.buffers.pop(key))
        return None


SCENARIOS = [random_scenario(seed) for seed in range(60)]


@pytest.fixture(scope="module", params=run.aimdo_releases())
def held_by_the_library(request: pytest.FixtureRequest) -> list[list[Any]]:
    folder = Path(sys.prefix) / f"aimdo-{request.param}"
    done = subprocess.run(
        [sys.executable, str(TESTS / "aimdo_native.py"), str(folder)],
        input=json.dumps(SCENARIOS),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def as_json(state: State) -> Any:
    return json.loads(json.dumps(state))


def test_after_every_call_the_simulation_holds_what_the_library_holds(held_by_the_library: list[list[Any]]) -> None:
    for seed, (scenario, states) in enumerate(zip(SCENARIOS, held_by_the_library, strict=True)):
        simulated = Simulated(scenario)
        for number, (call, held) in enumerate(zip(scenario["calls"], states, strict=True)):
            assert as_json(simulated.call(*call)) == held, f"scenario {seed}, call {number}: {call}"


def test_the_scenarios_reach_what_the_rules_are_about(held_by_the_library: list[list[Any]]) -> None:
    """Otherwise the comparison above would compare little."""
    seen = {"streamed": 0, "error": 0, "evicted": 0, "pinned below a watermark": 0, "refused": 0, "grown": 0}
    for scenario, states in zip(SCENARIOS, held_by_the_library, strict=True):
        before: dict[str, Any] = {}
        for call, (result, _, _, models) in zip(scenario["calls"], states, strict=True):
            seen["streamed"] += call[0] == "fault" and result is None
            seen["error"] += isinstance(result, str)
            seen["refused"] += call[0] == "tensor" and result is False
            seen["grown"] += call[0] == "buffer" and result is True
            for key, (watermark, pages) in models.items():
                seen["pinned below a watermark"] += any(page == 3 for page in pages[watermark:])
                seen["evicted"] += sum(old & 1 for old in before.get(key, (0, []))[1]) > sum(page & 1 for page in pages)
            before = models
    assert min(seen.values()) >= 20, seen
