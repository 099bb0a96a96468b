"""A benchmark, not a test: how long a plan of the official two-expert graph takes, bare and through REST.

usage, in the repository's root: .venv/bin/python tests/bench_plan.py
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from loadpack import load_pack

load_pack()

import planlab  # noqa: E402 - the pack has to be loaded first
from host.process import start_host  # noqa: E402
from prompts import official  # noqa: E402
from vram_headroom.vram.plan.graph import build_chain  # noqa: E402
from vram_headroom.vram.plan.planner import make_plan  # noqa: E402

CHECK = "/api/v1/hardware/vram/check"


def median_ms(work: Callable[[], object], times: int = 100) -> float:
    """Median milliseconds of one call, after one that warms the caches."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def plan_bare() -> None:
    card = planlab.card(16_000)
    chain = build_chain(planlab.two_experts(), planlab.VOCABULARY, planlab.library, planlab.RULES, card)
    make_plan(chain, card, planlab.RULES)


def main() -> None:
    prompt = official("video_wan2_2_14B_t2v")
    with start_host(vram_gb=16) as host:
        started = time.perf_counter()
        host.post(CHECK, prompt)
        cold = 1000 * (time.perf_counter() - started)
        figures = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "plan of the two-expert graph, small headers, ms": round(median_ms(plan_bare), 2),
            "REST check of the official graph, cold headers, ms": round(cold, 1),
            "REST check of the official graph, warm headers, ms": round(median_ms(lambda: host.post(CHECK, prompt)), 1),
            "REST status, ms": round(median_ms(lambda: host.get("/api/v1/hardware/vram")), 1),
        }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
