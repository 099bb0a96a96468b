"""How many steps a sampler runs: its own widgets, or the noise levels it is handed and whatever cuts them on the way.

Read in ComfyUI's nodes.py and comfy_extras/nodes_{custom_sampler,align_your_steps,gits,optimalsteps}.py (0.8 and 0.33).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from .prompt import MAX_HOPS, SWITCHES, Graph, Link, is_number, is_wildcard

STEP_RANGES: Final = (("start_at_step", "end_at_step"), ("start_step", "end_step"))
"""Widgets of samplers that run a part of the schedule: ComfyUI's and WanVideoWrapper's."""

STEPS_TO_RUN: Final = "steps_to_run"
"""Of a sampler that stops before the schedule's end, or -1 for all of it (RES4LYF's ClownsharKSampler_Beta)."""

MOST_STEPS: Final = 10_000
"""ComfyUI's own limit of every `steps` widget."""


def sampling_steps(graph: Graph, node_id: str) -> int | None:
    """Steps that the sampler `node_id` runs: all of its schedule or a part of it. None where that is not known."""
    spec = graph.spec(node_id)
    inputs = {*graph.inputs(node_id), *(spec.inputs if spec else ())}
    if "steps" not in inputs:
        sigmas = _sigmas(graph, node_id)
        return None if sigmas is None else schedule_steps(graph, sigmas)
    steps = _count(graph, node_id, "steps")
    if steps is None:
        return None
    first: object = 0
    last: object = steps
    for start, end in STEP_RANGES:
        first = graph.value(node_id, start) if start in inputs else first
        last = graph.value(node_id, end) if end in inputs else last
    if not is_number(first) or not is_number(last):
        return None
    # WanVideoWrapper says -1 for "to the end"
    left = max(0, (min(int(last), steps) if last >= 0 else steps) - int(first))
    if STEPS_TO_RUN in inputs and is_number(ran := graph.value(node_id, STEPS_TO_RUN)) and ran >= 0:
        left = min(left, int(ran))
    return 0 if "denoise" in inputs and graph.value(node_id, "denoise") == 0 else left


def schedule_steps(graph: Graph, link: Link, hops: int = 0) -> int | None:
    """Steps between the noise levels that the output `link` of type SIGMAS carries; None where that is not known."""
    if link.node_id not in graph.nodes or hops > MAX_HOPS:
        return None
    node_id = link.node_id
    class_type = graph.class_of(node_id)
    if class_type in SCHEDULES:
        return SCHEDULES[class_type](graph, node_id)
    source = _sigmas(graph, node_id)
    if source is None:
        return _count(graph, node_id, "steps")
    before = schedule_steps(graph, source, hops + 1)
    if before is None or class_type in KEEP_THEIR_STEPS or _hands_on(graph, link):
        return before
    cut = CUTS.get(class_type)
    return None if cut is None else cut(graph, link, before)


def _sigmas(graph: Graph, node_id: str) -> Link | None:
    return next((link for name, link in graph.links(node_id) if graph.input_type(node_id, name) == "SIGMAS"), None)


def _hands_on(graph: Graph, link: Link) -> bool:
    """A switch or a reroute: its output is whatever comes in."""
    spec = graph.spec(link.node_id)
    wild = spec is not None and link.slot < len(spec.outputs) and is_wildcard(spec.outputs[link.slot])
    return graph.class_of(link.node_id) in SWITCHES or wild


def _count(graph: Graph, node_id: str, name: str) -> int | None:
    value = graph.value(node_id, name)
    return int(value) if is_number(value) and 0 < value <= MOST_STEPS else None


def _share(graph: Graph, node_id: str) -> float | None:
    """`denoise`, which a scheduler without such a widget has at 1."""
    spec = graph.spec(node_id)
    if "denoise" not in {*graph.inputs(node_id), *(spec.inputs if spec else ())}:
        return 1.0
    value = graph.value(node_id, "denoise")
    return float(value) if is_number(value) else None


def _all_of_a_part(graph: Graph, node_id: str) -> int | None:
    """BasicScheduler: `denoise` makes the schedule longer, and its last `steps` are taken."""
    share = _share(graph, node_id)
    return 0 if share is not None and share <= 0 else _count(graph, node_id, "steps")


def _part_of_all(graph: Graph, node_id: str) -> int | None:
    steps, share = _count(graph, node_id, "steps"), _share(graph, node_id)
    return None if steps is None or share is None else min(steps, max(0, round(steps * share)))


def _turbo(graph: Graph, node_id: str) -> int | None:
    """SDTurboScheduler: of ten levels those that `denoise` leaves."""
    steps, share = _count(graph, node_id, "steps"), _share(graph, node_id)
    return None if steps is None or share is None else max(0, min(steps, int(10 * share)))


def _written_out(graph: Graph, node_id: str) -> int | None:
    levels = graph.value(node_id, "sigmas")
    return max(0, len(re.findall(r"[-+]?(?:\d*\.*\d+)", levels)) - 1) if isinstance(levels, str) else None


def _split(graph: Graph, link: Link, steps: int) -> int | None:
    at = graph.value(link.node_id, "step")
    if not is_number(at) or at < 0:
        return None
    return min(steps, int(at)) if link.slot == 0 else max(0, steps - int(at))


def _split_by_share(graph: Graph, link: Link, steps: int) -> int | None:
    share = _share(graph, link.node_id)
    if share is None:
        return None
    late = min(steps, max(0, round(steps * share)))
    if link.slot:
        return late
    # with nothing to leave out ComfyUI's slice is empty
    return steps - late if late else 0


SCHEDULES: Final[Mapping[str, Callable[[Graph, str], int | None]]] = {
    "BasicScheduler": _all_of_a_part,
    "AlignYourStepsScheduler": _part_of_all,
    "GITSScheduler": _part_of_all,
    "OptimalStepsScheduler": _part_of_all,
    "SDTurboScheduler": _turbo,
    "ManualSigmas": _written_out,
}
"""Schedulers whose levels are not simply as many as their `steps` say."""

CUTS: Final[Mapping[str, Callable[[Graph, Link, int], int | None]]] = {
    "SplitSigmas": _split,
    "SplitSigmasDenoise": _split_by_share,
}
"""Nodes that hand on a part of the levels they are given."""

KEEP_THEIR_STEPS: Final = frozenset({"FlipSigmas", "SetFirstSigma"})
