"""Which models the running nodes compute with: those that ComfyUI loaded for a node that has not ended yet."""

from __future__ import annotations

from .execution import HostExecution, NodeSpan, PromptSpan
from .placement import HostPlacement, Keys
from .seams import MODEL_LOADS, NODE_SPAN, SeamTable


class HostUses:
    """ComfyUI's own mark, `currently_used`, stays on a model until memory is next wanted, long after its last use.

    Written on the worker thread; read from any.
    """

    def __init__(self, seams: SeamTable, execution: HostExecution, placement: HostPlacement) -> None:
        self._known = seams.live(MODEL_LOADS) and seams.live(NODE_SPAN)
        self._execution = execution
        self._open: list[NodeSpan] = []
        self._uses: dict[NodeSpan, tuple[int, ...]] = {}
        execution.watch(self)
        execution.watch_nodes(self)
        placement.before_load(self._note)

    @property
    def known(self) -> bool:
        """False where a seam is missing that this needs."""
        return self._known

    def now(self) -> frozenset[int]:
        """Keys of the models that a node computes with right now."""
        return frozenset(key for keys in tuple(self._uses.values()) for key in keys)

    def of(self, span: NodeSpan) -> tuple[int, ...]:
        """Keys of the models that were loaded for this node, while it runs."""
        return self._uses.get(span, ())

    def _note(self, keys: Keys) -> None:
        node_id = self._execution.current_node()
        span = next((span for span in reversed(self._open) if span.node_id == node_id), None)
        if span is None and self._open:
            span = self._open[-1]
        if span is not None:
            self._uses[span] = tuple(dict.fromkeys((*self._uses.get(span, ()), *keys)))

    def prompt_started(self, span: PromptSpan) -> None:
        self._open.clear()
        self._uses = {}

    def node_started(self, span: NodeSpan) -> None:
        self._open.append(span)

    def node_ended(self, span: NodeSpan, error: BaseException | None) -> None:
        if self._open and self._open[-1] is span:
            self._open.pop()
        else:
            self._open = [other for other in self._open if other is not span]
        if span in self._uses:
            self._uses = {other: keys for other, keys in self._uses.items() if other is not span}

    def prompt_ended(self, span: PromptSpan) -> None:
        self.prompt_started(span)
