"""The order in which nodes run: a node is ready when all it needs has run; lazy inputs are needed once they are asked for."""

import inspect
from typing import Any

import nodes

from .graph_utils import ExecutionBlocker, is_link

__all__ = ["DependencyCycleError", "DynamicPrompt", "ExecutionBlocker", "ExecutionList", "NodeInputError", "get_input_info"]

Prompt = dict[str, dict[str, Any]]


class DependencyCycleError(Exception):
    pass


class NodeInputError(Exception):
    pass


class NodeNotFoundError(Exception):
    pass


class DynamicPrompt:
    """The prompt being run, with the nodes that others expanded into."""

    def __init__(self, original_prompt: Prompt) -> None:
        self.original_prompt = original_prompt
        self.ephemeral_prompt: Prompt = {}
        self.ephemeral_parents: dict[str, str] = {}
        self.ephemeral_display: dict[str, str] = {}

    def get_node(self, node_id: str) -> dict[str, Any]:
        for nodes_by_id in (self.ephemeral_prompt, self.original_prompt):
            if node_id in nodes_by_id:
                return nodes_by_id[node_id]
        raise NodeNotFoundError(f"Node {node_id} not found")

    def has_node(self, node_id: str) -> bool:
        return node_id in self.original_prompt or node_id in self.ephemeral_prompt

    def add_ephemeral_node(self, node_id: str, node_info: dict[str, Any], parent_id: str, display_id: str) -> None:
        self.ephemeral_prompt[node_id] = node_info
        self.ephemeral_parents[node_id] = parent_id
        self.ephemeral_display[node_id] = display_id

    def get_real_node_id(self, node_id: str) -> str:
        while node_id in self.ephemeral_parents:
            node_id = self.ephemeral_parents[node_id]
        return node_id

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self.ephemeral_parents.get(node_id)

    def get_display_node_id(self, node_id: str) -> str:
        while node_id in self.ephemeral_display:
            node_id = self.ephemeral_display[node_id]
        return node_id

    def all_node_ids(self) -> set[str]:
        return set(self.original_prompt) | set(self.ephemeral_prompt)

    def get_original_prompt(self) -> Prompt:
        return self.original_prompt


def get_input_info(
    class_def: Any, input_name: str, valid_inputs: dict[str, Any] | None = None
) -> tuple[Any, str, dict[str, Any]] | tuple[None, None, None]:
    """Type, category and options of one input."""
    inputs = valid_inputs or class_def.INPUT_TYPES()
    for category in ("required", "optional", "hidden"):
        if input_name in inputs.get(category, {}):
            definition = inputs[category][input_name]
            return definition[0], category, definition[1] if len(definition) > 1 else {}
    return None, None, None


class ExecutionList:
    """What is left to run, and what waits for what."""

    def __init__(self, dynprompt: DynamicPrompt, output_cache: Any) -> None:
        self.dynprompt = dynprompt
        self.output_cache = output_cache
        self.waits_for: dict[str, set[str]] = {}
        """Each pending node, in the order they came up, and the nodes it still waits for."""

    def is_cached(self, node_id: str) -> bool:
        return self.output_cache.get(node_id) is not None

    def get_cache(self, from_node_id: str, to_node_id: str) -> Any:
        """What the first node gave, for the second."""
        return self.output_cache.get(from_node_id)

    def is_empty(self) -> bool:
        return not self.waits_for

    def add_node(self, node_id: str) -> None:
        to_add = [node_id]
        while to_add:
            current = to_add.pop()
            if current in self.waits_for:
                continue
            needed = [source for source, lazy in self._links(current) if not lazy and not self.is_cached(source)]
            self.waits_for[current] = set(needed)
            to_add.extend(needed)

    def make_input_strong_link(self, node_id: str, input_name: str) -> None:
        """A node asked for a lazy input: from now on it waits for it."""
        inputs = self.dynprompt.get_node(node_id)["inputs"]
        if input_name not in inputs:
            raise NodeInputError(f"Node {node_id} says it needs input {input_name}, but there is no input to that node at all")
        if not is_link(inputs[input_name]):
            raise NodeInputError(f"Node {node_id} says it needs input {input_name}, but that value is a constant")
        source = inputs[input_name][0]
        if not self.is_cached(source):
            self.add_node(source)
            self.waits_for[node_id].add(source)

    def add_strong_link(self, from_node_id: str, from_socket: int, to_node_id: str) -> None:
        """The second node waits for the first from now on."""
        if not self.is_cached(from_node_id):
            self.add_node(from_node_id)
            self.waits_for[to_node_id].add(from_node_id)

    def next_node(self) -> str:
        """Raises DependencyCycleError when everything waits for something."""
        ready = [node_id for node_id, needed in self.waits_for.items() if not needed]
        if not ready:
            raise DependencyCycleError("Dependency cycle detected")
        return self._friendliest(ready)

    def complete(self, node_id: str) -> None:
        del self.waits_for[node_id]
        for needed in self.waits_for.values():
            needed.discard(node_id)

    def blame(self) -> str:
        """A node of the cycle."""
        left = dict(self.waits_for)
        while True:
            waited_for = set().union(*left.values()) if left else set()
            removable = [node_id for node_id in left if node_id not in waited_for]
            if not removable:
                return next(iter(left))
            for node_id in removable:
                del left[node_id]

    def _links(self, node_id: str) -> list[tuple[str, bool]]:
        node = self.dynprompt.get_node(node_id)
        class_def = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        definitions = class_def.INPUT_TYPES()
        found = []
        for name, value in node["inputs"].items():
            if is_link(value):
                options = get_input_info(class_def, name, definitions)[2]
                found.append((value[0], bool(options and options.get("lazy"))))
        return found

    def _friendliest(self, ready: list[str]) -> str:
        """Outputs first, then what stands right before one, then two before: pictures appear as early as they can."""

        def class_of(node_id: str) -> Any:
            return nodes.NODE_CLASS_MAPPINGS[self.dynprompt.get_node(node_id)["class_type"]]

        def is_output(node_id: str) -> bool:
            return getattr(class_of(node_id), "OUTPUT_NODE", False) is True

        def is_async(node_id: str) -> bool:
            found = class_of(node_id)
            return inspect.iscoroutinefunction(getattr(found, found.FUNCTION))

        def waiting(node_id: str) -> list[str]:
            return [other for other, needed in self.waits_for.items() if node_id in needed]

        for node_id in ready:
            if is_output(node_id) or is_async(node_id):
                return node_id
        for node_id in ready:
            if any(is_output(other) for other in waiting(node_id)):
                return node_id
        for node_id in ready:
            if any(is_output(second) for first in waiting(node_id) for second in waiting(first)):
                return node_id
        return ready[0]
