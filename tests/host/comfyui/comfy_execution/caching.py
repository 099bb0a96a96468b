"""Outputs kept between prompts, found again by what a node is given, not by its id."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import nodes

from .graph import DynamicPrompt
from .graph_utils import is_link


class CacheEntry(NamedTuple):
    ui: dict[str, Any] | None
    outputs: list[Any]


def hashable(value: Any) -> Any:
    if isinstance(value, int | float | str | bool | bytes | None):
        return value
    if isinstance(value, Mapping):
        return frozenset((hashable(key), hashable(item)) for key, item in value.items())
    if isinstance(value, Sequence):
        return tuple(hashable(item) for item in value)
    return float("nan")  # unequal to itself: never found again


class Signatures:
    """What makes each node's outputs the same as an earlier run's: its class, its values, and those of all before it."""

    def __init__(self, dynprompt: DynamicPrompt, is_changed: Mapping[str, Any]) -> None:
        self._dynprompt = dynprompt
        self._is_changed = is_changed
        self._known: dict[str, Any] = {}

    def of(self, node_id: str) -> Any:
        if node_id not in self._known:
            parent = self._dynprompt.get_parent_node_id(node_id)
            # a cache of its own for each node that expands, kept by that node's id and class (HierarchicalCache)
            scope = () if parent is None else (("INSIDE", parent, self._dynprompt.get_node(parent)["class_type"]),)
            order: dict[str, int] = {}
            self._ancestors(node_id, order)
            parts = [self._own(node_id, order), *(self._own(ancestor, order) for ancestor in order)]
            self._known[node_id] = (*scope, *parts)
        return self._known[node_id]

    def class_of(self, node_id: str) -> str:
        return self._dynprompt.get_node(node_id)["class_type"]

    def _ancestors(self, node_id: str, order: dict[str, int]) -> None:
        if not self._dynprompt.has_node(node_id):
            return
        inputs = self._dynprompt.get_node(node_id)["inputs"]
        for name in sorted(inputs):
            if is_link(inputs[name]) and inputs[name][0] not in order:
                order[inputs[name][0]] = len(order)
                self._ancestors(inputs[name][0], order)

    def _own(self, node_id: str, order: Mapping[str, int]) -> Any:
        if not self._dynprompt.has_node(node_id):
            return float("nan")
        node = self._dynprompt.get_node(node_id)
        class_def = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        parts: list[Any] = [node["class_type"], hashable(self._is_changed.get(node_id, False))]
        if "UNIQUE_ID" in class_def.INPUT_TYPES().get("hidden", {}).values() or getattr(class_def, "NOT_IDEMPOTENT", False):
            parts.append(node_id)
        for name in sorted(node["inputs"]):
            value = node["inputs"][name]
            parts.append((name, "ANCESTOR", order[value[0]], value[1]) if is_link(value) else (name, hashable(value)))
        return tuple(parts)


class OutputCache:
    """Outputs of the nodes of the current prompt; those of others are dropped as soon as it starts.

    ComfyUI 0.33 drops what the running prompt does not use once less RAM is free than the machine has, so always.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, CacheEntry] = {}
        self._signatures: Signatures | None = None

    def set_prompt(self, signatures: Signatures, node_ids: Iterable[str]) -> None:
        used = {signatures.of(node_id) for node_id in node_ids}
        scopes = {("INSIDE", node_id, signatures.class_of(node_id)) for node_id in node_ids}
        self._signatures = signatures
        self._entries = {key: entry for key, entry in self._entries.items() if key in used or key[0] in scopes}

    def keep_inside(self, parent_id: str, node_ids: Iterable[str]) -> None:
        """Of what `parent_id` expanded into before, only what is there again stays."""
        if self._signatures is None:
            return
        scope = ("INSIDE", parent_id, self._signatures.class_of(parent_id))
        used = {self._signatures.of(node_id) for node_id in node_ids}
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] != scope or key in used}

    def get(self, node_id: str) -> CacheEntry | None:
        return None if self._signatures is None else self._entries.get(self._signatures.of(node_id))

    def set(self, node_id: str, entry: CacheEntry) -> None:
        if self._signatures is not None:
            self._entries[self._signatures.of(node_id)] = entry
