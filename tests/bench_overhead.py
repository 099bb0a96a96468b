"""A benchmark, not a test: what the pack costs a prompt of 200 trivial nodes, and docs/overhead.md with the figures.

usage, in the repository's root: .venv/bin/python tests/bench_overhead.py [--pairs 200] [--comfyui CHECKOUT
    --comfyui-python PYTHON --comfyui-models DIR --comfyui-fixtures DIR --comfyui-pairs 20] [--write]
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from loadpack import ROOT, load_pack

load_pack()
sys.path.insert(0, str(Path(__file__).parent / "real"))

from host.process import start_host  # noqa: E402 - as the other benchmarks
from overhead import NODES, STOPWATCH, Ask, Clock, asking, difference, in_one_process, run_pairs  # noqa: E402
from real_comfyui import STATUS, RealComfyUI, start  # noqa: E402

SECONDS_TO_SETTLE = 180
REPORT = ROOT / "docs" / "overhead.md"
CLOCKS: dict[Clock, str] = {
    "worker": "CPU time of the worker thread",
    "process": "CPU time of the process",
    "wall": "time that passed",
}

HEAD = f"""# What the pack costs

The same prompt of {NODES} trivial nodes (each adds one; nothing cached), in a host with the pack and in one without, turn by
turn, from the moment the worker takes it out of the queue to the moment it hands the result in. Medians of the differences,
with 95 % confidence, and beside them the difference of the lower quartiles, which other work on the machine disturbs least.
Two hosts without the pack, compared in the same way (four times 60 pairs), differed by -3.4 to +4.4 % in the median and by
-10 to +7 % in the lower quartile: two processes can't tell 1 %. So the wrappers are compared with what they wrap in one process
as well, which leaves out what else the pack does in a host, such as the plan of a prompt that is posted.
Made by `tests/bench_overhead.py`. CI holds `tests/test_overhead.py` to five times 1 %.

"""


def rows(where: str, ours: Ask, theirs: Ask, pairs: int) -> list[str]:
    return table(where, run_pairs(ours, theirs, pairs), pairs)


def table(where: str, found: dict[Clock, list[tuple[float, float]]], pairs: int) -> list[str]:
    lines = [
        f"## {where}, {pairs} pairs\n",
        "| | without | with: added | 95 % | share | least disturbed |",
        "|---|---|---|---|---|---|",
    ]
    for clock, pairs_of_clock in found.items():
        seen, title = difference(pairs_of_clock), CLOCKS[clock]
        lines.append(
            f"| {title} | {seen.without * 1e3:.1f} ms | {seen.added * 1e3:+.2f} ms | "
            f"{seen.low * 1e3:+.2f} to {seen.high * 1e3:+.2f} ms | {seen.share:+.2%} | "
            f"{seen.calm_added * 1e3:+.2f} of {seen.calm_without * 1e3:.1f} ms, {seen.calm_share:+.2%} |"
        )
    return [*lines, ""]


class Options(argparse.Namespace):
    """What `real_comfyui.start` asks pytest's configuration for."""

    def getoption(self, name: str) -> Any:
        return getattr(self, name.removeprefix("--").replace("-", "_"))


@contextmanager
def real(options: Options, with_pack: bool) -> Iterator[RealComfyUI]:
    """A real ComfyUI with the stopwatch in it."""
    with tempfile.TemporaryDirectory() as folder:
        fixtures = Path(folder) / "fixtures"
        fixtures.mkdir()
        shutil.copy(STOPWATCH, fixtures)
        for pack in Path(options.comfyui_fixtures).iterdir() if options.comfyui_fixtures else ():
            (fixtures / pack.name).symlink_to(pack.resolve(), target_is_directory=pack.is_dir())
        config = Options(**{**vars(options), "comfyui_fixtures": str(fixtures)})
        yield from start(config, Path(folder), with_pack, fake_vram_mb=4000)  # type: ignore[arg-type]


def asking_real(host: RealComfyUI) -> Ask:
    def ask(path: str, body: Any) -> Any:
        status, answer = host.ask(path, body)
        assert status == 200, answer
        return answer

    return ask


def let_it_settle(host: RealComfyUI) -> None:
    """The self-check runs once for each installation, when nothing else does: it is no cost of a prompt."""
    end = time.monotonic() + SECONDS_TO_SETTLE
    while host.ask(STATUS)[1]["self_check"]["state"] == "waiting" and time.monotonic() < end:
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--comfyui-pairs", type=int, default=20)
    for name in ("--comfyui", "--comfyui-python", "--comfyui-models", "--comfyui-fixtures"):
        parser.add_argument(name)
    parser.add_argument("--write", action="store_true", help="write docs/overhead.md")
    options = parser.parse_args(namespace=Options())
    lines: list[str] = []
    if options.pairs:
        with start_host(custom_nodes=[STOPWATCH]) as ours, start_host(custom_nodes=[STOPWATCH], pack=False) as theirs:
            lines += rows("On the stand-in", asking(ours), asking(theirs), options.pairs)
        lines += table("On the stand-in, in one process", {"worker": in_one_process(options.pairs)}, options.pairs)
    if options.comfyui:
        with real(options, True) as with_pack, real(options, False) as without:
            let_it_settle(with_pack)
            version = with_pack.ask(STATUS)[1]["host"]["comfyui_version"]
            where = f"In ComfyUI {version} on a simulated card"
            lines += rows(where, asking_real(with_pack), asking_real(without), options.comfyui_pairs)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared with other work"
    lines.append(f"Machine: {machine}. Python {platform.python_version()}, torch {torch.__version__}.\n")
    text = HEAD + "\n".join(lines)
    sys.stdout.write(text)
    if options.write:
        REPORT.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
