"""A benchmark, not a test: how long estimates and plans take, bare and through REST, on the official files' own headers.

usage, in the repository's root: .venv/bin/python tests/bench_plan.py [--comfyui CHECKOUT --comfyui-python PYTHON]

With a checkout ComfyUI's own `validate_prompt` is timed beside the repeated check, on the same graph.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loadpack import load_pack

load_pack()

import planlab  # noqa: E402 - the pack has to be loaded first
from host.checkpoints import write_official_models  # noqa: E402
from host.process import start_host  # noqa: E402
from prompts import official  # noqa: E402
from test_templates import VOCABULARY  # noqa: E402
from vram_headroom.vram.estimate.checkpoint import HeaderCache  # noqa: E402
from vram_headroom.vram.plan.cache import Bounded, ChainCache, Reads, content_key  # noqa: E402
from vram_headroom.vram.plan.graph import build_chain  # noqa: E402
from vram_headroom.vram.plan.needs import need_of  # noqa: E402
from vram_headroom.vram.plan.planner import make_plan  # noqa: E402
from vram_headroom.vram.plan.sizing import Sizing  # noqa: E402
from vram_headroom.vram.plan.types import Card, HostRules, MissingFileError, Plan, no_media  # noqa: E402

CHECK = "/api/v1/hardware/vram/check"
GIB = 1 << 30
CARD = Card("16 GB", 16 * GIB, 16 * GIB)
RULES = HostRules(version="0.33.0")


def median_ms(work: Callable[[], object], times: int = 100) -> float:
    """Median milliseconds of one call, after one that warms the caches."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


class Files:
    """The official files in a folder, with their headers remembered."""

    def __init__(self, root: Path) -> None:
        self.paths = {path.name: path for path in write_official_models(root).values()}
        self.headers = HeaderCache()

    def find(self, folder: str, name: str) -> str | None:
        path = self.paths.get(name)
        return str(path) if path is not None and path.parent.name == folder else None

    def library(self, folder: str, name: str) -> Any:
        path = self.find(folder, name)
        if path is None:
            raise MissingFileError(f"{name} is not in models/{folder}")
        return self.headers.get(path)


def large_graph(nodes: int) -> dict[str, Any]:
    """The two-expert graph with a long tail of primitives and patches, so many nodes in all."""
    prompt = planlab.two_experts()
    last = ["75", 0]
    for index in range(nodes - len(prompt)):
        name = f"p{index}"
        prompt[name] = {"class_type": "ModelSamplingSD3", "inputs": {"model": last, "shift": 8.0}}
        last = [name, 0]
    prompt["81"]["inputs"]["model"] = last
    return prompt


def host_validation_ms(checkout: str, python: str, prompt: dict[str, Any]) -> float:
    """Median milliseconds of ComfyUI's own validate_prompt, on its own interpreter."""
    script = """
import asyncio, json, statistics, sys, time
prompt, sys.argv = json.load(open(sys.argv[1])), ["main.py", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import execution, nodes
asyncio.run(nodes.init_extra_nodes())
taken = []
for _ in range(101):
    started = time.perf_counter()
    asyncio.run(execution.validate_prompt("x", prompt, None))
    taken.append(time.perf_counter() - started)
print("MS", 1000 * statistics.median(taken[1:]))
"""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(prompt, file)
        file.flush()
        done = subprocess.run([python, "-c", script, file.name], cwd=checkout, capture_output=True, text=True, check=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("MS ")).split()[1])


def bare(figures: dict[str, object], root: Path) -> None:
    files, prompt = Files(root), official("video_wan2_2_14B_t2v")
    started = time.perf_counter()
    chain = build_chain(prompt, VOCABULARY, files.library, RULES, CARD)
    figures["cold: headers, sizes and chain of the official two-expert graph, ms"] = round(
        1000 * (time.perf_counter() - started), 1
    )
    names = [model.file for model in chain.models]
    cold = HeaderCache()
    started = time.perf_counter()
    for name in names:
        cold.get(files.paths[name])
    figures[f"cold: the headers of its {len(names)} files alone, ms"] = round(1000 * (time.perf_counter() - started), 1)
    sizing = Sizing()

    def fresh() -> None:
        make_plan(build_chain(prompt, VOCABULARY, files.library, RULES, CARD, sizing=sizing), CARD, RULES)

    figures["a fresh plan of it, warm headers, ms"] = round(median_ms(fresh), 2)
    figures["the estimates of all its phases, warm, ms"] = round(
        median_ms(lambda: [need_of(phase, RULES) for phase in chain.phases]), 3
    )
    many = large_graph(1000)
    tiny = Sizing()
    figures["a fresh plan of a graph of 1,000 nodes, ms"] = round(
        median_ms(
            lambda: make_plan(build_chain(many, planlab.VOCABULARY, planlab.library, RULES, CARD, sizing=tiny), CARD, RULES),
            20,
        ),
        1,
    )
    chains = ChainCache(files.find)
    reads = Reads(files.library, no_media, lambda name: None)
    kept_chain = build_chain(prompt, VOCABULARY, reads.header, RULES, CARD)
    chains.put(content_key(prompt, RULES, CARD.total), kept_chain, reads)
    answers: Bounded[Plan] = Bounded(32)
    answers.put(content_key(prompt, RULES, CARD), make_plan(kept_chain, CARD, RULES))

    def again() -> None:
        # as Pack.check does it: the files are looked at, the content is read twice
        assert chains.get(content_key(prompt, RULES, CARD.total)) is kept_chain
        assert answers.get(content_key(prompt, RULES, CARD)) is not None

    figures["the same graph asked about again, ms"] = round(median_ms(again), 2)
    tracemalloc.start()
    for index in range(40):
        other = {**prompt, "n": {"class_type": "PrimitiveInt", "inputs": {"value": index}}}
        reads = Reads(files.library, no_media, lambda name: None)
        chains.put(content_key(other), build_chain(other, VOCABULARY, reads.header, RULES, CARD, sizing=sizing), reads)
    figures[f"memory of {len(chains)} kept chains of it, MB"] = round(tracemalloc.get_traced_memory()[0] / 1e6, 1)
    tracemalloc.stop()


def served(figures: dict[str, object]) -> None:
    prompt = official("video_wan2_2_14B_t2v")
    with start_host(vram_gb=16) as host:
        started = time.perf_counter()
        host.post(CHECK, prompt)
        figures["REST check, cold, ms"] = round(1000 * (time.perf_counter() - started), 1)
        figures["REST check of the same graph again, with its fixes, ms"] = round(
            median_ms(lambda: host.post(CHECK, prompt), 50), 1
        )
        figures["REST status, ms"] = round(median_ms(lambda: host.get("/api/v1/hardware/vram"), 50), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui")
    parser.add_argument("--comfyui-python", default=sys.executable)
    arguments = parser.parse_args()
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        bare(figures, Path(folder))
    if arguments.comfyui:
        figures["ComfyUI's own validate_prompt of the same graph, ms"] = round(
            host_validation_ms(arguments.comfyui, arguments.comfyui_python, official("video_wan2_2_14B_t2v")), 2
        )
    served(figures)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
