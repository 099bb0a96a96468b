"""A benchmark, not a test: what the pack costs a prompt of 200 trivial nodes, and docs/overhead.md with the figures.

usage, in the repository's root: .venv/bin/python tests/bench_overhead.py [--pairs 200] [--comfyui CHECKOUT
    --comfyui-python PYTHON --comfyui-models DIR --comfyui-fixtures DIR --comfyui-pairs 200 --comfyui-starts 6]
    [--starts 10] [--write]
"""

import argparse
import os
import platform
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from loadpack import load_pack

load_pack()
sys.path.insert(0, str(Path(__file__).parent / "real"))

from host.process import start_host  # noqa: E402 - as the other benchmarks
from overhead import (  # noqa: E402
    CORES,
    INSTRUCTIONS,
    NODES,
    REPORT,
    STOPWATCH,
    Ask,
    Clock,
    Pairs,
    asking,
    difference,
    on_one_core,
    run_pairs,
    switched,
)
from real_comfyui import STATUS, RealComfyUI, start  # noqa: E402

SECONDS_TO_SETTLE = 180
STORED = ("vram_headroom", "selfcheck.json")
"""In ComfyUI's user folder (nodes/host/selfcheck.py)."""
FIRST = "Just installed"
CLOCKS: dict[Clock, str] = {
    "worker": "CPU time of the worker thread",
    "process": "CPU time of the process",
    "wall": "time that passed",
}

HEAD = f"""# What the pack costs

The same graph of {NODES} trivial nodes (each adds one; nothing cached) with the pack and without, turn by turn in drawn order,
from the moment the worker takes it out of the queue to the moment it hands the result in. Medians of the differences, with
95 % confidence (bootstrap), and beside them the difference of the lower quartiles, which other work disturbs least.

"In two hosts": one that has the pack and one that has not, both started anew again and again, since two processes differ by
some per cent whatever runs in them. "In one host": the check of what is posted and the wrappers around prompts and nodes are
switched on and off from prompt to prompt. That one is started anew as well: in some processes one more call around a prompt,
whatever it does, slows all that runs inside it (by 1 to 2 ms in a few of twenty, once by 34), in most it does not.

"{FIRST}": the first start after an installation or update, in which the pack checks itself once. That is over before a prompt
is timed here, but what Python has loaded for it stays until ComfyUI is started again, and makes all it does a little slower.

"On one core": all threads of the host share one, so that nothing that any of them does escapes the clock ("time that passed"
counts them all), and a thread always finds in the core's caches what another has left there. "On all cores" they move from one
to the other as they like.
Made by `tests/bench_overhead.py`. CI holds `tests/test_overhead.py` to five times 1 %.

"""


def table(where: str, found: Pairs) -> list[str]:
    lines = [
        f"## {where}, {len(found['worker'])} pairs\n",
        "| | without | with: added | 95 % | share | least disturbed |",
        "|---|---|---|---|---|---|",
    ]
    for clock, title in CLOCKS.items():
        seen = difference(found[clock])
        lines.append(
            f"| {title} | {seen.without * 1e3:.1f} ms | {seen.added * 1e3:+.2f} ms | "
            f"{seen.low * 1e3:+.2f} to {seen.high * 1e3:+.2f} ms | {seen.share:+.2%} | "
            f"{seen.calm_added * 1e3:+.2f} of {seen.calm_without * 1e3:.1f} ms, {seen.calm_share:+.2%} |"
        )
    share = difference(found["worker"])
    low, high = share.low / share.without, share.high / share.without
    return [*lines, "", f"Promised is less than 1 %; of the worker's time it is {share.share:.1%} ({low:.1%} to {high:.1%}).\n"]


Start = Callable[[bool], AbstractContextManager[Ask]]
"""Starts a host, with the pack or without, that stops at the end of the block."""


def in_two_hosts(start_one: Start, starts: int, pairs: int) -> Pairs:
    """Pairs of a host with the pack and one without it, started anew `starts` times."""
    found: Pairs = {"wall": [], "worker": [], "process": []}
    for number in range(starts):
        # who starts first is on the machine's cores first
        with start_one(number % 2 == 0) as first, start_one(number % 2 == 1) as second:
            ours, theirs = (first, second) if number % 2 == 0 else (second, first)
            for clock, more in run_pairs(ours, theirs, pairs // starts).items():
                found[clock] += more
    return found


def in_one_host(start_one: Start, starts: int, pairs: int) -> tuple[Pairs, Pairs]:
    """Pairs of a host with the pack switched on and off, and of one against itself, started anew `starts` times."""
    found: Pairs = {"wall": [], "worker": [], "process": []}
    itself: Pairs = {"wall": [], "worker": [], "process": []}
    for _ in range(starts):
        with start_one(True) as host:
            for clock, more in switched(host, pairs // starts).items():
                found[clock] += more
            for clock, more in switched(host, pairs // starts, against_itself=True).items():
                itself[clock] += more
    return found, itself


def one_host(where: str, start_one: Start, pairs: int, starts: int) -> list[str]:
    found, against_itself = in_one_host(start_one, starts, pairs)
    itself = difference(against_itself["worker"])
    low, high = itself.low / itself.without, itself.high / itself.without
    same = f"There the host without the pack differs from itself by {itself.share:+.1%} ({low:.1%} to {high:.1%}).\n"
    return [*table(where, found), same]


def measure(what: str, start_one: Start, pairs: int, starts: int, start_first: Start | None = None) -> list[str]:
    """Tables of one host and of two, all threads of each on one core, and of one host on all cores. `start_first` starts one as
    `start_one` does, but as after an installation."""

    def on_one(pack: bool) -> AbstractContextManager[Ask]:
        return on_one_core(start_one(pack))

    lines: list[str] = []
    started = f"started {starts} times"
    if CORES:
        lines += one_host(f"On one core, in one host, {what}, {started}", on_one, pairs, starts)
        lines += table(f"On one core, in two hosts, {what}, {started}", in_two_hosts(on_one, starts, pairs))
        if start_first is not None:
            found = in_two_hosts(lambda pack: on_one_core(start_first(pack)), starts, pairs)
            lines += table(f"{FIRST}, on one core, in two hosts, {what}, {started}", found)
    return lines + one_host(f"On all cores, in one host, {what}, {started}", start_one, pairs, starts)


@contextmanager
def stand_in(pack: bool) -> Iterator[Ask]:
    with start_host(custom_nodes=[STOPWATCH], pack=pack) as host:
        yield asking(host)


class Options(argparse.Namespace):
    """What `real_comfyui.start` asks pytest's configuration for."""

    def getoption(self, name: str) -> Any:
        return getattr(self, name.removeprefix("--").replace("-", "_"))


@contextmanager
def real(options: Options, with_pack: bool = True, checked: bytes | None = None) -> Iterator[RealComfyUI]:
    """A real ComfyUI with the stopwatch in it, and the pack, when nothing is left to be done of its start; `checked`: what an
    earlier one has stored of its self-check, which is then not done again."""
    with tempfile.TemporaryDirectory() as folder:
        if checked is not None:
            stored = Path(folder, *STORED)
            stored.parent.mkdir(parents=True)
            stored.write_bytes(checked)
        fixtures = Path(folder) / "fixtures"
        fixtures.mkdir()
        shutil.copy(STOPWATCH, fixtures)
        for pack in Path(options.comfyui_fixtures).iterdir() if options.comfyui_fixtures else ():
            (fixtures / pack.name).symlink_to(pack.resolve(), target_is_directory=pack.is_dir())
        config = Options(**{**vars(options), "comfyui_fixtures": str(fixtures)})
        for host in start(config, Path(folder), with_pack, fake_vram_mb=4000):  # type: ignore[arg-type]
            if with_pack:
                let_it_settle(host)
            yield host


def self_check(options: Options) -> bytes:
    """What a ComfyUI stores of its self-check, which it does once for each installation."""
    with real(options) as host:
        return host.log.parent.joinpath(*STORED).read_bytes()


def asking_real(host: RealComfyUI) -> Ask:
    def ask(path: str, body: Any) -> Any:
        status, answer = host.ask(path, body)
        assert status == 200, answer
        return answer

    return ask


def release(checkout: str) -> str:
    """Of a ComfyUI, as it calls itself."""
    return runpy.run_path(str(Path(checkout) / "comfyui_version.py"))["__version__"]


def let_it_settle(host: RealComfyUI) -> None:
    """The self-check runs when nothing else does: the time that it takes is no prompt's."""
    end = time.monotonic() + SECONDS_TO_SETTLE
    while host.ask(STATUS)[1]["self_check"]["state"] == "waiting" and time.monotonic() < end:
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--comfyui-pairs", type=int, default=200)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--comfyui-starts", type=int, default=6)
    for name in ("--comfyui", "--comfyui-python", "--comfyui-models", "--comfyui-fixtures"):
        parser.add_argument(name)
    parser.add_argument("--write", action="store_true", help="write docs/overhead.md")
    options = parser.parse_args(namespace=Options())
    lines: list[str] = []
    if options.pairs:
        lines += measure("the stand-in", stand_in, options.pairs, options.starts)
    if options.comfyui:
        checked = self_check(options)

        @contextmanager
        def comfyui(pack: bool) -> Iterator[Ask]:
            with real(options, pack, checked) as host:
                yield asking_real(host)

        @contextmanager
        def installed(pack: bool) -> Iterator[Ask]:
            with real(options, pack) as host:
                yield asking_real(host)

        version = f"ComfyUI {release(options.comfyui)} on a simulated card"
        lines += measure(version, comfyui, options.comfyui_pairs, options.comfyui_starts, installed)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared with other work"
    lines.append(f"Machine: {machine}. Python {platform.python_version()}, torch {torch.__version__}.\n")
    text = HEAD + "\n".join(lines)
    sys.stdout.write(text)
    if options.write:
        _, section, rest = REPORT.read_text("utf-8").partition(INSTRUCTIONS)
        REPORT.write_text(text + (f"\n{section}{rest}" if section else ""), "utf-8")


if __name__ == "__main__":
    main()
