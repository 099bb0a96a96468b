"""Changes to an API-format prompt: what they are, a prompt with them, their JSON, and which widget a value is written at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypedDict, TypeGuard

from .ours import PASSES
from .prompt import CONSTANTS, EXPRESSIONS, MAX_HOPS, SCALARS, SWITCHES, Graph, Link, as_link, is_wildcard

OTHER_QUANTITIES: Final = frozenset(
    {"batch_size", "cfg", "denoise", "end_at_step", "fps", "frame_rate", "height", "length", "noise_seed", "num_frames", "seed"}
    | {"start_at_step", "steps", "strength", "width"}
)
"""Inputs whose names say what they mean: a number that feeds one of them by chance must not be changed for another's sake."""

DECIMALS: Final = 3
"""A number behind an expression is looked for in steps of a thousandth: 24 frames a second need 0.042 s each."""


@dataclass(frozen=True, slots=True)
class SetInput:
    """A widget gets another value. A list is the value of an array widget, never a link."""

    node_id: str
    input: str
    value: object


@dataclass(frozen=True, slots=True)
class ReplaceNode:
    """A node becomes one of another class with the same outputs. `inputs` are all it will have, as the prompt writes them."""

    node_id: str
    class_type: str
    inputs: Mapping[str, object]


Change = SetInput | ReplaceNode


class SetInputReport(TypedDict):
    """A SetInput for the browser. `value` and `old` are the widget's own values, arrays bare; `old` null: it was not there."""

    node_id: str
    input: str
    value: object
    old: object


class ReplaceNodeReport(TypedDict):
    """A ReplaceNode for the browser."""

    node_id: str
    class_type: str
    inputs: dict[str, object]
    old_class_type: str
    old_inputs: dict[str, object]


def apply(prompt: Mapping[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """A new prompt with `changes` made in order. `prompt` stays as it is; nodes that do not change are shared with it.

    An input that is not there yet is added, since prompts leave optional widgets out. Raises ValueError that names the node and
    the input when a node is missing or is no node, when an input is a link, when a value is no JSON, or when two changes
    contradict each other.
    """
    if not isinstance(prompt, Mapping):
        raise ValueError(f"prompt must be a JSON object of nodes by id, not {type(prompt).__name__}")
    patched = dict(prompt)
    made: dict[tuple[str, str], object] = {}
    for change in changes:
        if not isinstance(change, (SetInput, ReplaceNode)):
            raise ValueError(f"changes must hold SetInput and ReplaceNode only, not {change!r}")
        node = _node(patched, change.node_id)
        if isinstance(change, ReplaceNode):
            _agree(made, change.node_id, "class_type", change.class_type)
            for name, value in change.inputs.items():
                _check_json(value, change.node_id, name)
            patched[change.node_id] = {**node, "class_type": change.class_type, "inputs": dict(change.inputs)}
            continue
        _agree(made, change.node_id, change.input, change.value)
        _check_json(change.value, change.node_id, change.input)
        inputs = node.get("inputs", {})
        if as_link(inputs.get(change.input)) is not None:
            raise ValueError(f"{change.input} of node {change.node_id} is linked: it takes its value from another node")
        patched[change.node_id] = {**node, "inputs": {**inputs, change.input: _wrap(change.value)}}
    return patched


def change_report(prompt: Mapping[str, Any], change: Change) -> SetInputReport | ReplaceNodeReport:
    """`change` to `prompt` as JSON, with what is there now. Raises ValueError as `apply` does."""
    apply(prompt, (change,))
    node = _node(prompt, change.node_id)
    inputs: Mapping[str, object] = node.get("inputs", {})
    if isinstance(change, SetInput):
        return SetInputReport(
            node_id=change.node_id, input=change.input, value=_bare(change.value), old=_bare(inputs.get(change.input))
        )
    return ReplaceNodeReport(
        node_id=change.node_id,
        class_type=change.class_type,
        inputs=dict(change.inputs),
        old_class_type=str(node.get("class_type", "")),
        old_inputs=dict(inputs),
    )


class Widget(NamedTuple):
    """An input of a node, by name."""

    node_id: str
    input: str


class _Route(NamedTuple):
    """How an input gets its value: the widget it is written at, and whether arithmetic lies between."""

    widget: Widget
    computed: bool


class Widgets:
    """The widgets behind the inputs of one graph: where a value is written that reaches an input through links."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._readers: dict[Link, list[Widget]] = {}
        for node_id in graph.nodes:
            for name, value in graph.inputs(node_id).items():
                if (link := as_link(value)) is not None:
                    self._readers.setdefault(link, []).append(Widget(node_id, name))

    def behind(self, inputs: Iterable[Widget]) -> dict[Widget, _Route] | None:
        """The widget behind each of `inputs`, or None if one has none that can be changed for these inputs alone."""
        wanted = frozenset(inputs)
        routes: dict[Widget, _Route] = {}
        for here in wanted:
            found = list(dict.fromkeys(self._routes(here, wanted, False, 0)))
            if len(found) != 1:
                return None
            routes[here] = found[0]
        return routes

    def settings(self, wanted: Mapping[Widget, object]) -> tuple[SetInput, ...] | None:
        """The changes that give each input its value; None if there are none, or only such that change something else as well.

        A number that comes from a constant through arithmetic is set at the constant, as the smallest value that gives it.
        """
        routes = self.behind(wanted)
        if routes is None:
            return None
        changes: dict[Widget, object] = {}
        for here, value in wanted.items():
            widget, computed = routes[here]
            value = self._solve(here, widget, value) if computed else self._typed(widget, value)
            if value is None or (widget in changes and changes[widget] != value):
                return None
            changes[widget] = value
        found = tuple(SetInput(widget.node_id, widget.input, changes[widget]) for widget in sorted(changes))
        after = self._with(found)
        return found if all(after.value(*here) == value for here, value in wanted.items()) else None

    def _routes(self, here: Widget, wanted: frozenset[Widget], computed: bool, hops: int) -> Iterator[_Route]:
        graph = self._graph
        link = graph.link(*here)
        if link is None:
            # an operand written at the expression itself is part of the expression
            if not computed or graph.class_of(here.node_id) not in EXPRESSIONS:
                yield _Route(here, computed)
            return
        if link.node_id not in graph.nodes or hops > MAX_HOPS or not self._alone(link, here, wanted, computed):
            return
        node_id = link.node_id
        class_type = graph.class_of(node_id)
        if class_type in SWITCHES:
            branch = graph.taken_branch(node_id)
            if isinstance(branch, str):
                yield from self._routes(Widget(node_id, branch), wanted, computed, hops + 1)
        elif class_type in EXPRESSIONS:
            for name in graph.inputs(node_id):
                if name.startswith(EXPRESSIONS[class_type][1]):
                    yield from self._routes(Widget(node_id, name), wanted, True, hops + 1)
        elif (name := self._passed_on(link)) is not None:
            yield from self._routes(Widget(node_id, name), wanted, computed, hops + 1)

    def _alone(self, link: Link, here: Widget, wanted: frozenset[Widget], computed: bool) -> bool:
        """Who else reads `link` may have the same value: of an operand nobody, else who does not mean something else by it."""
        others = [reader for reader in self._readers.get(link, ()) if reader != here and reader not in wanted]
        if computed:
            return not others
        foreign = OTHER_QUANTITIES - {name for _, name in wanted}
        return not any(reader.input in foreign for reader in self._ends(others) if reader not in wanted)

    def _ends(self, readers: Iterable[Widget]) -> Iterator[Widget]:
        """These inputs and those that a value reaches unchanged through them."""
        left, seen = list(readers), set[Widget]()
        while left:
            here = left.pop()
            if here in seen:
                continue
            seen.add(here)
            yield here
            spec = self._graph.spec(here.node_id)
            for slot in range(len(spec.outputs) if spec else 0):
                out = Link(here.node_id, slot)
                if self._graph.class_of(here.node_id) in SWITCHES or self._passed_on(out) == here.input:
                    left.extend(self._readers.get(out, ()))

    def _passed_on(self, link: Link) -> str | None:
        """The input whose value the node puts out unchanged: of primitives and reroutes, and one of the output's own name."""
        graph = self._graph
        spec = graph.spec(link.node_id)
        if spec is None or link.slot >= len(spec.outputs):
            return None
        inputs, output = graph.inputs(link.node_id), spec.outputs[link.slot]
        if (handed_on := PASSES.get(graph.class_of(link.node_id))) is not None:
            return handed_on
        if is_wildcard(output) and len(inputs) == 1:
            return next(iter(inputs))
        if len(spec.inputs) == 1 and (only := next(iter(spec.inputs))).lower() in CONSTANTS and spec.inputs[only] == output:
            return only
        name = spec.output_names[link.slot] if link.slot < len(spec.output_names) else ""
        return name if output in SCALARS and spec.inputs.get(name) == output else None

    def _typed(self, widget: Widget, value: object) -> object:
        """`value` as the widget's type writes it."""
        spec = self._graph.spec(widget.node_id)
        declared = spec.inputs.get(widget.input) if spec else None
        return float(value) if declared == "FLOAT" and isinstance(value, int) and not isinstance(value, bool) else value

    def _solve(self, here: Widget, widget: Widget, target: object) -> int | float | None:
        """The smallest value of `widget`, from 0 to what it is now, that gives `here` the number `target`."""
        now, spec = self._graph.value(*widget), self._graph.spec(widget.node_id)
        if not _is_number(now) or not _is_number(target) or not 0 < now < 1e9:
            return None
        whole = isinstance(now, int) and (spec is None or spec.inputs.get(widget.input) != "FLOAT")
        steps = 1 if whole else 10**DECIMALS

        def reaches(count: int) -> bool:
            value = self._with((SetInput(*widget, self._at(count, steps)),)).value(*here)
            return _is_number(value) and value >= target

        low, high = 0, math.ceil(now * steps)
        if not reaches(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle + 1, high)
        # whether it gives exactly the target is checked with all other changes
        return self._at(low, steps)

    @staticmethod
    def _at(count: int, steps: int) -> int | float:
        return count if steps == 1 else round(count / steps, DECIMALS)

    def _with(self, changes: Iterable[SetInput]) -> Graph:
        return Graph(nodes=apply(self._graph.nodes, changes), vocabulary=self._graph.vocabulary, targets=())


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def _node(prompt: Mapping[str, Any], node_id: str) -> Mapping[str, Any]:
    node = prompt.get(node_id)
    if node is None:
        raise ValueError(f"node {node_id} is not in the prompt")
    if not isinstance(node, Mapping) or not isinstance(node.get("inputs", {}), Mapping):
        raise ValueError(f"node {node_id} is not a JSON object with class_type and inputs")
    return node


def _agree(made: dict[tuple[str, str], object], node_id: str, name: str, value: object) -> None:
    key = (node_id, name)
    if key in made and made[key] != value:
        raise ValueError(f"{name} of node {node_id} can't be both {made[key]!r} and {value!r}")
    made[key] = value


def _check_json(value: object, node_id: str, name: str) -> None:
    try:
        good = _is_json(value)
    except RecursionError:
        good = False
    if not good:
        raise ValueError(f"the value for {name} of node {node_id} is no JSON: {type(value).__name__}")


def _is_json(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (list, tuple)):
        return all(_is_json(part) for part in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    return value is None or isinstance(value, (str, int))


def _wrap(value: object) -> object:
    """As the prompt writes it: arrays are wrapped, or they would be read as links."""
    return {"__value__": list(value)} if isinstance(value, (list, tuple)) else value


def _bare(value: object) -> object:
    return value["__value__"] if isinstance(value, Mapping) and set(value) == {"__value__"} else value
