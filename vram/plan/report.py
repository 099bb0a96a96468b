"""A Plan as the JSON that the REST answer, the dialog and scripts read. Field names are kept stable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from ..estimate.estimate import Term
from .advice import FixReport
from .ram import RamPlan
from .types import Card, Estimate, ModelRef, PhasePlan, Plan


class EstimateReport(TypedDict):
    """Bytes."""

    expected: int
    lower: int
    upper: int


class TermReport(TypedDict):
    """One part of an estimate's expected value."""

    name: str
    bytes: int


class ModelReport(TypedDict):
    node_id: str
    role: str
    file: str
    bytes: int | None
    """Sum of the file's tensors; null when the file can't be read."""
    resident_bytes: int | None
    architecture: str


class PhaseReport(TypedDict):
    kind: str
    node_ids: list[str]
    title: str
    models: list[str]
    loras: list[str]
    width: int | None
    height: int | None
    frames: int | None
    batch: int | None
    steps: int | None
    cfg: float | None
    resident_bytes: int
    """Weights of this phase on the card."""
    other_models_bytes: int
    """Weights of other models that stay there."""
    streamed_bytes: int
    """Per sampling step."""
    leaving: list[str]
    activation_bytes: EstimateReport | None
    """What it needs beside weights; null where that is not known."""
    activation_terms: list[TermReport]
    peak_allocated_bytes: EstimateReport | None
    """Of everything the host holds: what must fit."""
    peak_reserved_bytes: EstimateReport | None
    """What a monitor will show; null where the allocator was not simulated."""
    available_bytes: int
    short_bytes: int


class RamReport(TypedDict):
    verdict: str
    message: str
    needed_bytes: int | None
    available_bytes: int | None


class CardReport(TypedDict):
    name: str
    total_bytes: int
    free_bytes: int


class CheckReport(TypedDict):
    fits: bool
    """The graph runs: true for every verdict but `does_not_fit`."""
    verdict: str
    message: str
    plan_id: str
    card: CardReport
    ram: RamReport | None
    models: list[ModelReport]
    phases: list[PhaseReport]
    peak_phase: int | None
    """Index of the phase that decides."""
    fixes: list[FixReport]
    """What would make it fit, best first."""
    assumptions: list[str]


def check_report(plan: Plan, fixes: Iterable[FixReport] = ()) -> CheckReport:
    """The answer of POST /api/v1/hardware/vram/check."""
    return CheckReport(
        fits=plan.runs,
        verdict=plan.verdict,
        message=plan.message,
        plan_id=plan.plan_id,
        card=_card(plan.card),
        ram=None if plan.ram is None else _ram(plan.ram),
        models=[_model(model) for model in plan.models],
        phases=[_phase(planned) for planned in plan.phases],
        peak_phase=plan.peak_phase,
        fixes=list(fixes),
        assumptions=list(plan.assumptions),
    )


def _card(card: Card) -> CardReport:
    return CardReport(name=card.name, total_bytes=card.total, free_bytes=card.free)


def _ram(ram: RamPlan) -> RamReport:
    return RamReport(
        verdict=ram.verdict,
        message=ram.message,
        needed_bytes=None if ram.need is None else max(0, ram.need.expected - ram.present),
        available_bytes=None if ram.need is None else ram.room,
    )


def _model(model: ModelRef) -> ModelReport:
    return ModelReport(
        node_id=model.node_id,
        role=model.role,
        file=model.file,
        bytes=model.file_bytes,
        resident_bytes=model.resident_bytes,
        architecture=model.architecture,
    )


def _phase(planned: PhasePlan) -> PhaseReport:
    phase = planned.phase
    return PhaseReport(
        kind=phase.kind,
        node_ids=[phase.node_id],
        title=phase.title,
        models=[model.file for model in phase.models],
        loras=[lora.file for lora in phase.loras],
        width=phase.width,
        height=phase.height,
        frames=phase.frames,
        batch=phase.batch,
        steps=phase.steps,
        cfg=phase.cfg,
        resident_bytes=planned.resident,
        other_models_bytes=planned.others,
        streamed_bytes=planned.streamed,
        leaving=list(planned.leaving),
        activation_bytes=_estimate(planned.activation),
        activation_terms=[TermReport(name=term.name, bytes=term.bytes) for term in _terms(planned)],
        peak_allocated_bytes=_estimate(planned.peak),
        peak_reserved_bytes=_estimate(planned.peak_reserved),
        available_bytes=planned.available,
        short_bytes=planned.short,
    )


def _terms(planned: PhasePlan) -> tuple[Term, ...]:
    return planned.activation.terms if planned.activation else ()


def _estimate(estimate: Estimate | None) -> EstimateReport | None:
    if estimate is None:
        return None
    return EstimateReport(expected=estimate.expected, lower=estimate.lower, upper=estimate.upper)
