"""What of a graph the host need not run again: nodes that are as they were in the last run, whose results it still has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .prompt import Graph, as_link


@dataclass(frozen=True, slots=True)
class Kept:
    """What the host has of its last run."""

    run: str
    """Its id: equal where `prompt` is."""
    prompt: Mapping[str, Any]
    nodes: frozenset[str]
    """Nodes of it whose results are still there."""
    changing: frozenset[str] = frozenset()
    """Classes that tell only when they run whether anything has changed (IS_CHANGED, fingerprint_inputs)."""

    @property
    def stamp(self) -> tuple[object, ...]:
        """Equal for what saves a graph the same nodes."""
        return (self.run, tuple(sorted(self.nodes)))


def unchanged(prompt: object, kept: Kept | None) -> frozenset[str]:
    """Nodes of `prompt` that will not run: equal in class, inputs and all ancestors to the one of the same id in the last run.

    One that may have changed without its prompt changing, such as a picture in the input folder, is none of them, and neither
    is whatever depends on it.
    """
    if kept is None or not kept.nodes or not isinstance(prompt, dict) or not _is_graph(prompt) or not _is_graph(kept.prompt):
        return frozenset()
    numbers: dict[object, int] = {}
    now, then = (Graph(nodes, {}, (), _numbers=numbers) for nodes in (prompt, kept.prompt))
    same = {
        node for node in kept.nodes if node in prompt and node in then.nodes and now.signature(node) == then.signature(node)
    }
    return frozenset(same - _changing(now, kept.changing))


def _is_graph(prompt: Mapping[str, Any]) -> bool:
    return all(isinstance(node, dict) and isinstance(node.get("inputs", {}), dict) for node in prompt.values())


def _changing(graph: Graph, classes: frozenset[str]) -> set[str]:
    """Nodes of these classes, and all that depend on one."""
    readers: dict[str, list[str]] = {}
    for node_id in graph.nodes:
        for value in graph.inputs(node_id).values():
            if (link := as_link(value)) is not None:
                readers.setdefault(link.node_id, []).append(node_id)
    found: set[str] = set()
    left = [node_id for node_id in graph.nodes if graph.class_of(node_id) in classes]
    while left:
        here = left.pop()
        if here not in found:
            found.add(here)
            left += readers.get(here, ())
    return found
