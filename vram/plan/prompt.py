"""An API-format prompt as a graph: links, values through primitive and switch nodes, and the order nodes run in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeGuard

from .expression import ExpressionError, evaluate
from .ours import PASSES
from .sizes import AtMost, Dim, Size
from .types import Media, NodeSpec, NodeVocabulary, no_media

SCALARS: Final = frozenset({"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"})

MAX_HOPS: Final = 64
"""Values that come through more nodes than this are called unknown: each costs a few Python frames of its 1000."""

MAX_SLOT: Final = 1 << 16
"""No node has that many outputs; what claims to be one is no link."""


class PromptError(ValueError):
    """What was given is no API-format prompt; the message says what is wrong with it and where."""


class Link(NamedTuple):
    """The output `slot` of node `node_id`."""

    node_id: str
    slot: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value that is not known before the graph runs, and why."""

    reason: str


class Switch(NamedTuple):
    """Input names of a node class that passes one of two inputs on and never evaluates the other."""

    condition: str
    when_true: str
    when_false: str


SWITCHES: Final[Mapping[str, Switch]] = {
    "ComfySwitchNode": Switch("switch", "on_true", "on_false"),
    "ComfySoftSwitchNode": Switch("switch", "on_true", "on_false"),
}

EXPRESSIONS: Final[Mapping[str, tuple[str, str]]] = {
    "ComfyMathExpression": ("expression", "values."),
    "MathExpression|pysssss": ("expression", ""),
    "SimpleMath+": ("value", ""),
}
"""Node class -> its expression input and what the names of its operands begin with: ComfyUI's own, and those of the Custom
Scripts and Essentials packs, whose operands are `a`, `b` and `c`."""

CONSTANTS: Final = frozenset({"value", "int", "float", "number", "string", "boolean"})
"""What the only widget of a node that puts it out unchanged is called, in ComfyUI and in the packs that have such nodes."""


Measures = Mapping[tuple[str, int], "Callable[[Graph, str], Dim]"]
"""Integer outputs (class, slot) that say the size of a picture or a latent, and how to tell it before they run."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes by id, with the vocabulary that types them. Build with `parse_prompt`."""

    nodes: Mapping[str, Mapping[str, Any]]
    vocabulary: NodeVocabulary
    targets: tuple[str, ...]
    measures: Measures = field(default_factory=dict, compare=False)
    media: Media = field(default=no_media, compare=False)
    assumed: dict[str, None] = field(default_factory=dict, compare=False)
    """What was assumed to find a value, in sentences."""
    sizes: dict[Link, Size] = field(default_factory=dict, compare=False)
    """Sizes of pictures and latents found so far."""
    _signatures: dict[str, int] = field(default_factory=dict, compare=False)
    _numbers: dict[object, int] = field(default_factory=dict, compare=False)
    _values: dict[Link, object] = field(default_factory=dict, compare=False)
    _types: dict[Link, str] = field(default_factory=dict, compare=False)
    _linked: dict[str, dict[str, Link]] = field(default_factory=dict, compare=False)
    _plain: dict[str, Iterable[tuple[str, Link]]] = field(default_factory=dict, compare=False)
    """Of nodes that are no switches."""
    _specs: dict[str, NodeSpec | None] = field(default_factory=dict, compare=False)

    def class_of(self, node_id: str) -> str:
        class_type = self.nodes[node_id].get("class_type")
        return class_type if isinstance(class_type, str) else ""

    def spec(self, node_id: str) -> NodeSpec | None:
        try:
            return self._specs[node_id]
        except KeyError:
            found = self._specs[node_id] = self.vocabulary.get(self.class_of(node_id))
            return found

    def inputs(self, node_id: str) -> Mapping[str, Any]:
        return self.nodes[node_id].get("inputs") or {}

    def title(self, node_id: str) -> str:
        """What a person knows the node by: its title where it has one of its own, else its class, and its id."""
        meta = self.nodes[node_id].get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        return f"{title if isinstance(title, str) and title else self.class_of(node_id) or 'node'} {node_id}"

    def link(self, node_id: str, name: str) -> Link | None:
        """Where input `name` comes from, or None if it is a value or absent."""
        return self._links(node_id).get(name)

    def links(self, node_id: str) -> Iterable[tuple[str, Link]]:
        """Linked inputs that would be evaluated: the branch that a switch does not take is left out."""
        plain = self._plain.get(node_id)
        if plain is not None:
            return plain
        linked = self._links(node_id).items()
        if self.class_of(node_id) not in SWITCHES:
            self._plain[node_id] = linked
            return linked
        untaken = self._untaken_branch(node_id)
        return [(name, link) for name, link in linked if name != untaken]

    def _links(self, node_id: str) -> dict[str, Link]:
        """All linked inputs, found once: every node is asked for them a dozen times."""
        linked = self._linked.get(node_id)
        if linked is None:
            linked = {name: link for name, value in self.inputs(node_id).items() if (link := as_link(value)) is not None}
            self._linked[node_id] = linked
        return linked

    def input_type(self, node_id: str, name: str) -> str:
        """Declared type of an input; for an undeclared one (wildcards, grown inputs) the type of what it is linked to."""
        spec = self.spec(node_id)
        declared = spec.inputs.get(name) if spec else None
        if declared is not None and not is_wildcard(declared):
            return declared
        link = self.link(node_id, name)
        return self.output_type(link) if link else declared or "*"

    def output_type(self, link: Link, hops: int = 0) -> str:
        """Declared type of an output; of a wildcard one the type of what comes in."""
        if link.node_id not in self.nodes or hops > MAX_HOPS:
            return "*"
        if link in self._types:
            return self._types[link]
        spec = self.spec(link.node_id)
        declared = spec.outputs[link.slot] if spec and link.slot < len(spec.outputs) else "*"
        # known before its inputs are asked, so that a loop and a diamond of switches end here
        self._types[link] = declared
        if is_wildcard(declared):
            for _, source in self.links(link.node_id):
                found = self.output_type(source, hops + 1)
                if not is_wildcard(found) and found not in SCALARS:
                    self._types[link] = found
                    break
        return self._types[link]

    def value(self, node_id: str, name: str, hops: int = 0) -> object:
        """The value of input `name`: a plain JSON value, or Unknown. A missing one is its declared default."""
        inputs = self.inputs(node_id)
        if name not in inputs:
            spec = self.spec(node_id)
            if spec and name in spec.defaults:
                return spec.defaults[name]
            return Unknown(f"{self.title(node_id)} has no value for {name}")
        link = self.link(node_id, name)
        if link is not None:
            return self.output_value(link, hops)
        raw = inputs[name]
        return _as_declared(raw, self.input_type(node_id, name)) if isinstance(raw, str) else _unwrap(raw)

    def output_value(self, link: Link, hops: int = 0) -> object:
        """The value of an output that primitive, switch and arithmetic nodes make, or Unknown with the reason."""
        if link in self._values:
            return self._values[link]
        if hops > MAX_HOPS:
            return Unknown(f"the value of {link.node_id} comes from too many nodes away")
        self._values[link] = Unknown(f"{link.node_id} depends on itself")
        self._values[link] = found = self._compute(link, hops)
        return found

    def _compute(self, link: Link, hops: int) -> object:
        node_id = link.node_id
        if node_id not in self.nodes:
            return Unknown(f"node {node_id} is not in the prompt")
        class_type = self.class_of(node_id)
        if class_type in SWITCHES:
            branch = self.taken_branch(node_id, hops + 1)
            return self._input_value(node_id, branch, hops) if isinstance(branch, str) else branch
        if class_type in EXPRESSIONS:
            return self._expression_value(node_id, link.slot, hops)
        if (measure := self.measures.get((class_type, link.slot))) is not None:
            measured = measure(self, node_id)
            return Unknown(f"the size that {self.title(node_id)} tells depends on its input") if measured is None else measured
        if (passed := self._passed_on(node_id, link.slot)) is not None:
            return self._input_value(node_id, passed, hops)
        return Unknown(f"{self.title(node_id)} is only known when it has run")

    def _input_value(self, node_id: str, name: str, hops: int) -> object:
        return self.value(node_id, name, hops + 1)

    def _passed_on(self, node_id: str, slot: int) -> str | None:
        """The input a node passes on unchanged: of primitives, of reroutes, and one of the output's own name and type."""
        spec = self.spec(node_id)
        if spec is None or slot >= len(spec.outputs):
            return None
        if (handed_on := PASSES.get(self.class_of(node_id))) is not None:
            return handed_on
        if is_wildcard(spec.outputs[slot]) and len(self.inputs(node_id)) == 1:
            return next(iter(self.inputs(node_id)))
        if (
            len(spec.inputs) == 1
            and (only := next(iter(spec.inputs))).lower() in CONSTANTS
            and spec.outputs[slot] == spec.inputs[only]
        ):
            return only
        name = spec.output_names[slot] if slot < len(spec.output_names) else ""
        if spec.outputs[slot] in SCALARS and spec.inputs.get(name) == spec.outputs[slot]:
            self.assumed[f"{self.title(node_id)} passes its {name} on unchanged"] = None
            return name
        return None

    def _expression_value(self, node_id: str, slot: int, hops: int) -> object:
        expression_input, prefix = EXPRESSIONS[self.class_of(node_id)]
        names: dict[str, int | float] = {}
        note = ""
        for name in self.inputs(node_id):
            if name.startswith(prefix):
                operand = self._input_value(node_id, name, hops)
                if isinstance(operand, Unknown):
                    return operand
                if isinstance(operand, AtMost):
                    operand, note = operand.value, operand.note
                if isinstance(operand, (int, float)):
                    names[name.removeprefix(prefix)] = operand
        expression = self._input_value(node_id, expression_input, hops)
        if not isinstance(expression, str):
            return Unknown(f"{self.title(node_id)} has no expression")
        try:
            result = evaluate(expression, names)
        except ExpressionError as error:
            return Unknown(f"{self.title(node_id)}: {error}")
        spec = self.spec(node_id)
        kind = spec.outputs[slot] if spec and slot < len(spec.outputs) else "FLOAT"
        if not note:
            return {"INT": int, "BOOLEAN": bool}.get(kind, float)(result)
        # what follows from a bound is a number to plan with, but no ground to choose a branch on
        return Unknown(note) if kind == "BOOLEAN" else AtMost(int(result), note)

    def taken_branch(self, node_id: str, hops: int = 0) -> str | Unknown:
        """The input that a switch passes on, or why that is not known."""
        switch = SWITCHES[self.class_of(node_id)]
        condition = self.value(node_id, switch.condition, hops)
        if isinstance(condition, Unknown):
            return condition
        if isinstance(condition, AtMost):
            return Unknown(condition.note)
        taken = switch.when_true if condition else switch.when_false
        other = switch.when_false if condition else switch.when_true
        return taken if taken in self.inputs(node_id) else other

    def _untaken_branch(self, node_id: str) -> str | None:
        taken = self.taken_branch(node_id)
        switch = SWITCHES[self.class_of(node_id)]
        if isinstance(taken, Unknown):
            return None
        return switch.when_false if taken == switch.when_true else switch.when_true

    def signature(self, node_id: str) -> int:
        """Equal for nodes of equal class, inputs and ancestors: ComfyUI's cache takes them for one (comfy_execution/caching.py,
        CacheKeySetInputSignature). Without recursion: a chain of a thousand nodes is no reason to fail."""
        signatures, numbers = self._signatures, self._numbers
        stack = [node_id]
        while stack:
            here = stack[-1]
            if here in signatures:
                stack.pop()
                continue
            inputs = self.inputs(here)
            sources = self._links(here)
            waiting = [
                link.node_id for link in sources.values() if link.node_id in self.nodes and link.node_id not in signatures
            ]
            if waiting and len(stack) <= len(self.nodes):
                stack += waiting
                continue
            parts = [
                (name, signatures.get(link.node_id, link.node_id), link.slot)
                if (link := sources.get(name))
                else (name, repr(value))
                for name, value in sorted(inputs.items())
            ]
            key = (self.class_of(here) or here, tuple(parts))
            signatures[here] = numbers.setdefault(key, len(numbers))
            stack.pop()
        return signatures[node_id]

    def run_order(self, cached: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Ids of the nodes that would run, inputs before the nodes they feed. Raises PromptError for a loop.

        The results of `cached` ones are there: neither they run nor what only they need.
        """
        order: list[str] = []
        done: set[str] = set()
        open_path: dict[str, None] = {}
        for target in self.targets:
            stack: list[tuple[str, Iterator[tuple[str, Link]]]] = []
            if target not in done and target not in cached:
                open_path[target] = None
                stack.append((target, iter(self.links(target))))
            while stack:
                node_id, pending = stack[-1]
                for _, link in pending:
                    if link.node_id in open_path:
                        raise PromptError(f"nodes {' -> '.join([*open_path, link.node_id])} form a loop")
                    if link.node_id not in done and link.node_id in self.nodes and link.node_id not in cached:
                        open_path[link.node_id] = None
                        stack.append((link.node_id, iter(self.links(link.node_id))))
                        break
                else:
                    stack.pop()
                    del open_path[node_id]
                    done.add(node_id)
                    order.append(node_id)
        return tuple(order)


def parse_prompt(
    prompt: object,
    vocabulary: NodeVocabulary,
    targets: Iterable[str] | None = None,
    measures: Measures | None = None,
    media: Media = no_media,
) -> Graph:
    """Check that `prompt` is an API-format prompt and find what would be run.

    `targets` limits it to these output nodes, as ComfyUI's partial_execution_targets does. `measures` tells the sizes that
    nodes put out as numbers, `media` those of input files.
    Raises PromptError when it is no prompt; anything wrong inside a node is left for the planner to say.
    """
    if not isinstance(prompt, dict) or not prompt:
        raise PromptError("a prompt is a non-empty JSON object of nodes by id, as ComfyUI's Export (API) writes it")
    if isinstance(prompt.get("nodes"), list):
        raise PromptError("this is a saved workflow; a prompt is what ComfyUI's Export (API) writes")
    for node_id, node in prompt.items():
        if not isinstance(node_id, str) or not isinstance(node, dict):
            raise PromptError(f"node {node_id!r} is not a JSON object with class_type and inputs")
        if not isinstance(node.get("inputs", {}), dict):
            raise PromptError(f"the inputs of node {node_id!r} are not a JSON object")
    if not any("class_type" in node for node in prompt.values()):
        raise PromptError("no node has a class_type: this is no API-format prompt")
    wanted = None if targets is None else set(targets)
    outputs = tuple(
        node_id
        for node_id, node in prompt.items()
        if (spec := vocabulary.get(str(node.get("class_type", "")))) is not None
        and spec.is_output
        and (wanted is None or node_id in wanted)
    )
    return Graph(nodes=prompt, vocabulary=vocabulary, targets=outputs, measures=measures or {}, media=media)


def class_types(prompt: object) -> frozenset[str]:
    """The node classes a prompt names, for a host that builds its vocabulary on demand."""
    if not isinstance(prompt, dict):
        return frozenset()
    named = (node.get("class_type") for node in prompt.values() if isinstance(node, dict))
    return frozenset(name for name in named if isinstance(name, str))


def as_link(value: object) -> Link | None:
    """ComfyUI's own test for a link: a list of a node id and a slot number (comfy_execution/graph_utils.py is_link)."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    node_id, slot = value
    if not isinstance(node_id, str) or not isinstance(slot, (int, float)) or isinstance(slot, bool):
        return None
    return Link(node_id, int(slot)) if 0 <= slot < MAX_SLOT else None


def is_wildcard(declared: str) -> bool:
    """A type that takes whatever it is linked to."""
    return declared == "*" or declared.startswith(("COMFY_MATCHTYPE", "COMFY_AUTOGROW"))


def is_number(value: object) -> TypeGuard[int | float]:
    """A number a widget may hold: neither infinite, nor NaN, nor an integer too large for any arithmetic."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def _as_declared(value: str, declared: str) -> object:
    """A number that a script wrote as text, as ComfyUI reads it (execution.py, validate_inputs)."""
    if declared in ("INT", "FLOAT"):
        try:
            return int(value) if declared == "INT" else float(value)
        except ValueError:
            return value
    return value


def _unwrap(value: object) -> object:
    """The front end wraps array widgets as {"__value__": [...]}."""
    if isinstance(value, dict) and set(value) == {"__value__"}:
        return value["__value__"]
    return value
