"""Runs inside the stand-in: a prompt with the pack's wrappers in place and with what they wrap, turn by turn in one process.

Two processes differ by some per cent whatever runs in them (where their memory lies, which core they are on); one does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import execution
from overhead import STOPWATCH, trivial_prompt

from .seamlab import Lab

MARK = "__vram_headroom_seam__"


def original(function: Any) -> Any:
    while hasattr(function, MARK):
        function = function.__wrapped__
    return function


@contextmanager
def unwrapped() -> Iterator[None]:
    node, prompt = execution.get_output_data, execution.PromptExecutor.execute
    execution.get_output_data, execution.PromptExecutor.execute = original(node), original(prompt)
    yield
    execution.get_output_data, execution.PromptExecutor.execute = node, prompt


def pairs(count: int, warm_up: int = 5) -> list[tuple[float, float]]:
    """Seconds of CPU time of the worker thread, (with the wrappers, without them), of prompts that were checked when queued."""
    lab = Lab()
    lab.import_pack()
    assert lab.nodes.load_custom_node(str(STOPWATCH))
    executor = execution.PromptExecutor(lab.server)
    found: list[tuple[float, float]] = []

    def run(number: int) -> float:
        prompt, prompt_id = trivial_prompt(number * 1000), str(number)
        outputs = asyncio.run(execution.validate_prompt(prompt_id, prompt, None))[2]
        lab.pack.plans.put(prompt_id, lab.pack.plan(prompt))
        lab.journal.clear()
        started = time.thread_time()
        executor.execute(prompt, prompt_id, {}, outputs)
        spent = time.thread_time() - started
        assert executor.success
        return spent

    for pair in range(-warm_up, count):
        number = (pair + warm_up) * 2
        if pair % 2:
            ours = run(number)
            with unwrapped():
                theirs = run(number + 1)
        else:
            with unwrapped():
                theirs = run(number + 1)
            ours = run(number)
        if pair >= 0:
            found.append((ours, theirs))
    return found
