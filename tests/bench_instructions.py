"""A benchmark, not a test: how many instructions the worker thread executes for a prompt of 200 trivial nodes, with the pack
and without. Other work on the machine hardly changes them, as it does the time that the prompt takes.

usage, in the repository's root: .venv/bin/python tests/bench_instructions.py [--pairs 20] [--write]
It needs valgrind, its headers and a C compiler, and takes 6 s a prompt.
"""

import argparse
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from loadpack import load_pack

load_pack()

from host.process import start_host  # noqa: E402 - as the other benchmarks
from overhead import INSTRUCTIONS, NODES, REPORT, STOPWATCH, asking, trivial_prompt  # noqa: E402

PACKS = STOPWATCH.parent
WARM_UP = 8
"""Prompts: callgrind translates what it has not seen before."""


def counts(folder: Path) -> dict[str, int]:
    """Instructions of each dumped prompt by its id: the thread that dumped, the worker, has all of them."""
    found: dict[str, int] = {}
    for path in folder.glob("counts.*"):
        text = path.read_text()
        prompt = re.search(r"^desc: Trigger: Client Request: (\S+)", text, re.M)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.M)
        if prompt and total:
            found[prompt[1]] = max(found.get(prompt[1], 0), int(total[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write the section of docs/overhead.md")
    options = parser.parse_args()
    dice = random.Random(options.pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "callgrind.so"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, PACKS / "callgrind.c"], check=True)
        os.environ["CALLGRIND_REQUESTS"] = str(library)
        valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", "--separate-threads=yes"]
        under = [*valgrind, f"--callgrind-out-file={folder / 'counts'}"]
        sides: dict[bool, list[str]] = {True: [], False: []}
        with start_host(custom_nodes=[STOPWATCH, PACKS / "counting.py"], under=under) as host:
            ask = asking(host)
            for pair in range(-WARM_UP // 2, options.pairs):
                order = [True, False]
                dice.shuffle(order)
                for side in order:
                    ask("/stopwatch/pack", {"on": side})
                    start = ((pair + WARM_UP) * 2 + side) * NODES * 2
                    queued = ask("/prompt", {"prompt": trivial_prompt(start), "client_id": "instructions"})
                    ask(f"/stopwatch/{queued['prompt_id']}", None)
                    if pair >= 0:
                        sides[side].append(queued["prompt_id"])
        found = counts(folder)
    without = statistics.mean(found[prompt] for prompt in sides[False])
    added = [found[ours] - found[theirs] for ours, theirs in zip(sides[True], sides[False], strict=True)]
    error = statistics.stdev(added) / len(added) ** 0.5
    mean = statistics.mean(added)
    version = subprocess.run(["valgrind", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    section = (
        f"{INSTRUCTIONS}\n\n"
        f"In one host, {len(added)} pairs, counted by callgrind on the worker thread: {without / 1e6:.1f} million without\n"
        f"the pack, {mean / 1e6:+.2f} million with (standard error {error / 1e6:.2f}), **{mean / without:+.2%}**. Clocks\n"
        "see more than that, probably since what runs once in a node finds little of itself in the nearest cache.\n"
        "All nodes count as short here, since valgrind makes each take 50 times as long.\n"
        "Made by `tests/bench_instructions.py`; other work on the machine hardly changes it.\n\n"
        f"Machine: {platform.system()} {platform.machine()}. Python {platform.python_version()}, torch {torch.__version__},\n"
        f"{version}.\n"
    )
    sys.stdout.write(section)
    if options.write:
        REPORT.write_text(REPORT.read_text("utf-8").partition(INSTRUCTIONS)[0].rstrip() + "\n\n" + section, "utf-8")


if __name__ == "__main__":
    main()
