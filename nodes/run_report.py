"""The run record as the browser reads it: the plan, where the prompt is in it, what was measured, what was recovered from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from ..vram.incidents import Incident
from ..vram.peaks import NodePeak
from ..vram.plan.report import CheckReport, check_report
from ..vram.plan.types import Plan
from ..vram.run_record import RunSeen, Sample
from .lifecycle import Lifecycle
from .pack import Pack


class MeasuredReport(TypedDict):
    """The most that one node of the run took."""

    phase: int | None
    """Index in the plan's phases; null for a node that is in none."""
    node_id: str
    peak_bytes: int
    exact: bool
    """The allocator's own peak; false: the most of what this process was seen to hold."""
    lower_bound: bool
    """It may have been more: somebody else reset the allocator's counter meanwhile."""


class MarkReport(TypedDict):
    """From when on a phase was computing."""

    phase: int
    """Index in the plan's phases."""
    node_id: str
    at: float
    """Seconds since the prompt's start."""


class PhaseReport(TypedDict):
    """`vram_headroom.phase`."""

    prompt_id: str
    state: str
    phase: int | None
    """Index in the plan's phases; null between them, and at the end."""
    node_id: str | None
    at: float
    """Seconds since the prompt's start."""
    samples: list[tuple[float, int]]
    """Seconds since the start and bytes that this process held, since the last event."""
    measured: list[MeasuredReport]
    """Of all nodes that have ended."""
    marks: list[MarkReport]
    """Of all phases that have begun."""


class RecoveryReport(TypedDict):
    """`vram_headroom.recovery`."""

    prompt_id: str
    node_id: str
    kind: str
    attempt: int
    at: float
    freed_bytes: int
    same_picture: bool
    file: str | None
    message: str


class PlanReport(TypedDict):
    """`vram_headroom.plan`."""

    prompt_id: str
    plan: CheckReport | None


class RunReport(TypedDict):
    """The run that goes on, or the last one."""

    prompt_id: str
    state: str
    plan: CheckReport | None
    phase: int | None
    node_id: str | None
    at: float
    samples: list[tuple[float, int]]
    """Of the whole run, thinned."""
    measured: list[MeasuredReport]
    marks: list[MarkReport]
    recoveries: list[RecoveryReport]


class Place(NamedTuple):
    """Where a run is: equal for two moments between which nothing happened but samples."""

    state: str
    phase: int | None
    node_id: str | None
    measured: tuple[tuple[object, ...], ...]


class RunAnswer(NamedTuple):
    """A run for one who knows nothing of it, and what they know then."""

    report: RunReport
    place: Place
    taken: int
    plan: Plan | None


class RunReports:
    """Makes reports of runs. Any thread."""

    def __init__(self, pack: Pack, lifecycle: Lifecycle) -> None:
        self._pack = pack
        self._lifecycle = lifecycle
        self._plan: tuple[str, Plan] | None = None
        self._report: tuple[Plan, CheckReport] | None = None

    def plan_of(self, run: RunSeen) -> Plan | None:
        """The newest plan of it. The last one asked for is remembered, however many prompts have been queued since."""
        found = self._pack.plans.get(run.prompt_id)
        last = self._plan
        if found is None:
            return last[1] if last is not None and last[0] == run.prompt_id else None
        self._plan = run.prompt_id, found
        return found

    def plan(self, plan: Plan | None) -> CheckReport | None:
        """The check's answer without fixes; None for no plan."""
        if plan is None:
            return None
        known = self._report
        if known is None or known[0] is not plan:
            # made once for all who watch
            known = self._report = plan, check_report(plan)
        return known[1]

    def phase(self, run: RunSeen, after: int) -> tuple[PhaseReport, Place]:
        """The event, with the samples after the first `after`, and the place that it tells."""
        measured = self._measured(run)
        place = self._place(run, measured)
        report = PhaseReport(
            prompt_id=run.prompt_id,
            state=run.state,
            phase=place.phase,
            node_id=place.node_id,
            at=round(run.at, 3),
            samples=_pairs(self._lifecycle.record.fresh(run.prompt_id, after)),
            measured=measured,
            marks=self._marks(run),
        )
        return report, place

    def run(self, run: RunSeen) -> RunAnswer:
        """Everything there is of it."""
        measured, plan = self._measured(run), self.plan_of(run)
        place = self._place(run, measured)
        report = RunReport(
            prompt_id=run.prompt_id,
            state=run.state,
            plan=self.plan(plan),
            phase=place.phase,
            node_id=place.node_id,
            at=round(run.at, 3),
            samples=_pairs(self._lifecycle.record.samples(run.prompt_id)),
            measured=measured,
            marks=self._marks(run),
            recoveries=[self.recovery(incident, run) for incident in self._pack.incidents.of(run.prompt_id)],
        )
        return RunAnswer(report, place, run.taken, plan)

    def recovery(self, incident: Incident, run: RunSeen | None) -> RecoveryReport:
        started = run.started if run is not None and run.prompt_id == incident.prompt_id else incident.taken_at
        return RecoveryReport(
            prompt_id=incident.prompt_id,
            node_id=incident.node_id,
            kind=incident.kind,
            attempt=incident.attempt,
            at=round(max(0.0, incident.taken_at - started), 3),
            freed_bytes=incident.freed_bytes,
            same_picture=incident.same_picture,
            file=incident.file,
            message=incident.message,
        )

    def _place(self, run: RunSeen, measured: list[MeasuredReport]) -> Place:
        node_id = run.failed_node
        if run.state == "running":
            running = self._pack.host.execution.running
            here = running is not None and running.prompt_id == run.prompt_id and running.node_id is not None
            node_id = _shown(str(running.node_id)) if running is not None and here else None
        plan = self.plan_of(run)
        phase = None
        if node_id is not None and plan is not None:
            passes = sum(_shown(peak.node_id) == node_id for peak in self._lifecycle.peaks.of(run.prompt_id))
            # a node that failed has ended as well
            phase = _phase_of(plan, node_id, passes if run.state == "running" else max(0, passes - 1))
        return Place(run.state, phase, node_id, tuple(tuple(one.values()) for one in measured))

    def _marks(self, run: RunSeen) -> list[MarkReport]:
        plan = self.plan_of(run)
        passes: Counter[str] = Counter()
        found: list[MarkReport] = []
        for mark in run.marks:
            phase = _phase_of(plan, mark.node_id, passes[mark.node_id]) if plan is not None else None
            passes[mark.node_id] += 1
            if phase is not None:
                found.append(MarkReport(phase=phase, node_id=mark.node_id, at=mark.at))
        return found

    def _measured(self, run: RunSeen) -> list[MeasuredReport]:
        """By node and phase; of a node that ran again and again in one, the most."""
        plan = self.plan_of(run)
        found: dict[tuple[str, int | None], MeasuredReport] = {}
        passes: Counter[str] = Counter()
        for peak in self._lifecycle.peaks.of(run.prompt_id):
            node_id = _shown(peak.node_id)
            phase = _phase_of(plan, node_id, passes[node_id]) if plan is not None else None
            passes[node_id] += 1
            report = self._peak(peak, node_id, phase)
            before = found.get((node_id, phase))
            if report is not None and (before is None or before["peak_bytes"] < report["peak_bytes"]):
                found[node_id, phase] = report
        return list(found.values())

    def _peak(self, peak: NodePeak, node_id: str, phase: int | None) -> MeasuredReport | None:
        exact = peak.allocated is not None and self._lifecycle.counts_pages
        nbytes = peak.allocated if exact else peak.sampled
        if nbytes is None:
            return None
        return MeasuredReport(
            phase=phase, node_id=node_id, peak_bytes=nbytes, exact=exact, lower_bound=exact and peak.lower_bound
        )


def _shown(node_id: str) -> str:
    """The node of the graph that it belongs to (NodeSpan.shown_id)."""
    return node_id.split(".", 1)[0]


def _phase_of(plan: Plan, node_id: str, passes: int) -> int | None:
    """The phase that a node computes after it has ended `passes` times; its last one however often it runs."""
    found = [index for index, planned in enumerate(plan.phases) if planned.phase.node_id == node_id]
    return found[min(passes, len(found) - 1)] if found else None


def _pairs(samples: Iterable[Sample]) -> list[tuple[float, int]]:
    return [(sample.at, sample.bytes) for sample in samples]
