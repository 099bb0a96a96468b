"""Links, and the value that blocks what depends on it."""

from typing import Any


def is_link(obj: Any) -> bool:
    return isinstance(obj, list) and len(obj) == 2 and isinstance(obj[0], str) and isinstance(obj[1], int | float)


class Node:
    """A node of a graph that is being built."""

    def __init__(self, id: str, class_type: str, inputs: dict[str, Any]) -> None:
        self.id, self.class_type, self.inputs = id, class_type, inputs

    def out(self, index: int) -> list[Any]:
        return [self.id, index]

    def serialize(self) -> dict[str, Any]:
        return {"class_type": self.class_type, "inputs": self.inputs}


class GraphBuilder:
    """Builds what a node expands into; ids begin with the id of that node and a dot."""

    _root, _call, _graph = "", 0, 0

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = GraphBuilder.alloc_prefix() if prefix is None else prefix
        self.nodes: dict[str, Node] = {}

    @classmethod
    def set_default_prefix(cls, prefix_root: str, call_index: int, graph_index: int = 0) -> None:
        cls._root, cls._call, cls._graph = prefix_root, call_index, graph_index

    @classmethod
    def alloc_prefix(cls, root: str | None = None, call_index: int | None = None, graph_index: int | None = None) -> str:
        found = f"{cls._root if root is None else root}.{cls._call if call_index is None else call_index}"
        found += f".{cls._graph if graph_index is None else graph_index}."
        cls._graph += 1
        return found

    def node(self, class_type: str, id: str | None = None, **kwargs: Any) -> Node:
        name = self.prefix + (str(len(self.nodes) + 1) if id is None else id)
        return self.nodes.setdefault(name, Node(name, class_type, kwargs))

    def lookup_node(self, id: str) -> Node | None:
        return self.nodes.get(self.prefix + id)

    def finalize(self) -> dict[str, Any]:
        return {name: node.serialize() for name, node in self.nodes.items()}


class ExecutionBlocker:
    """As an input: the node is not run. A message makes an error of it."""

    def __init__(self, message: str | None) -> None:
        self.message = message
