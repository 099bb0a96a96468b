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
        self._uses: dict[NodeSpan, tuple[int, ...]] = {}
        execution.watch(self)
        placement.before_load(self._note)

    @property
    def known(self) -> bool:
        """False where a seam is missing that this needs."""
        return self._known

    def now(self) -> frozenset[int]:
        """Keys of the models that a node computes with right now."""
        return frozenset(key for span, keys in tuple(self._uses.items()) if self._execution.is_open(span) for key in keys)

    def of(self, span: NodeSpan) -> tuple[int, ...]:
        """Keys of the models that were loaded for this node, which runs or has just ended. Worker thread only."""
        return self._uses.get(span, ())

    def _note(self, keys: Keys) -> None:
        span = self._execution.open_span(self._execution.current_node())
        if span is None:
            return
        # nodes that have ended are left out here, where few pass by, and not at each end
        uses = {other: used for other, used in self._uses.items() if self._execution.is_open(other)}
        uses[span] = tuple(dict.fromkeys((*uses.get(span, ()), *keys)))
        self._uses = uses
        self._execution.tell(span)

    def prompt_started(self, span: PromptSpan) -> None:
        self._uses = {}

    def prompt_ended(self, span: PromptSpan) -> None:
        self._uses = {}
