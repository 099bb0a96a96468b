"""A prompt and its plan taken apart for those who look for what could be turned in it, and what a knob is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

from .graph import GENERATORS, TEXT_ENCODERS
from .patch import Change, Widget, Widgets
from .prompt import Graph, parse_prompt
from .siblings import FileLister
from .types import Library, ModelRef, ModelRole, NodeVocabulary, PhasePlan, Plan

Picture = Literal["nothing", "slower", "tiled", "fewer", "lower_precision", "shorter", "smaller"]
"""What a fix does to the result. `slower`: the same picture, later. `tiled`: decoded in overlapping tiles, which may show
faintly. `fewer`: not as many videos at once, each the same."""

PICTURES: Final[tuple[Picture, ...]] = ("nothing", "slower", "tiled", "fewer", "lower_precision", "shorter", "smaller")
"""From what costs the result nothing to what costs it most: the order fixes are offered in. The order is our choice."""

LOADED_AS: Final[Mapping[ModelRole, tuple[str, ...]]] = {"generator": GENERATORS, "text_encoder": TEXT_ENCODERS}
"""Types of the links that a model of a role goes out on."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The same prompt in another setup, such as a policy or a launch flag: advice as text, with the plan it leads to."""

    id: str
    title: str
    picture: Picture
    plan: Callable[[], Plan]
    note: str = ""


class Turn(NamedTuple):
    """One setting of a knob."""

    title: str
    changes: tuple[Change, ...]
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Knob:
    """Settings from the mildest, 0, to the strongest: each needs no more than the one before it."""

    id: str
    picture: Picture
    levels: int
    turn: Callable[[int], Turn | None]
    """None for a setting that the graph's own arithmetic can't take."""


@dataclass(frozen=True)
class Bench:
    """A prompt and its plan, taken apart for whoever looks for knobs."""

    prompt: Mapping[str, Any]
    plan: Plan
    vocabulary: NodeVocabulary
    library: Library | None = None
    files: FileLister | None = None
    targets: tuple[str, ...] | None = None

    @cached_property
    def graph(self) -> Graph:
        return parse_prompt(dict(self.prompt), self.vocabulary, self.targets)

    @cached_property
    def widgets(self) -> Widgets:
        return Widgets(self.graph)

    @cached_property
    def order(self) -> tuple[str, ...]:
        return self.graph.run_order()

    @cached_property
    def pressing(self) -> tuple[PhasePlan, ...]:
        """The phases that need too much; all of them where it is not one phase's own need."""
        return tuple(planned for planned in self.plan.phases if planned.short) or self.plan.phases

    @cached_property
    def upstream(self) -> tuple[str, ...]:
        """Nodes the pressing phases depend on, themselves included, in the order they run."""
        reached = {planned.phase.node_id for planned in self.pressing if planned.phase.node_id in self.graph.nodes}
        left = list(reached)
        while left:
            for _, link in self.graph.links(left.pop()):
                if link.node_id in self.graph.nodes and link.node_id not in reached:
                    reached.add(link.node_id)
                    left.append(link.node_id)
        return tuple(node_id for node_id in self.order if node_id in reached)

    def whole(self, node_id: str, name: str) -> int | None:
        """The whole number above 0 that an input has; None where it has none that is known before the graph runs."""
        value = self.graph.value(node_id, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1 << 24:
            return None
        return int(value) if value == int(value) else None

    def has(self, node_id: str, *names: str) -> bool:
        """The node's class, or the prompt for an input that is not declared, has these inputs."""
        spec = self.graph.spec(node_id)
        return spec is not None and all(name in spec.inputs or name in self.graph.inputs(node_id) for name in names)

    def makes(self, node_id: str, kind: str) -> bool:
        spec = self.graph.spec(node_id)
        return spec is not None and kind in spec.outputs

    def loaders(self, model: ModelRef) -> tuple[Widget, ...]:
        """The widgets that name the file of `model`: several nodes may load what the host keeps as one."""
        return tuple(
            Widget(node_id, name)
            for node_id in self.order
            if any(self.makes(node_id, kind) for kind in LOADED_AS.get(model.role, ())) and not self._models_in(node_id)
            for name in self.graph.inputs(node_id)
            if self.graph.value(node_id, name) == model.file
        )

    def _models_in(self, node_id: str) -> list[str]:
        kinds = {*GENERATORS, *TEXT_ENCODERS}
        return [name for name, _ in self.graph.links(node_id) if self.graph.input_type(node_id, name) in kinds]


def in_words(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
