"""A Plan as the JSON that the REST answer, the dialog and scripts read. Field names are kept stable."""

from __future__ import annotations

from typing import TypedDict

from .types import Estimate, ModelRef, PhasePlan, Plan


class EstimateReport(TypedDict):
    expected: int
    lower: int
    upper: int


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
    streamed_bytes: int
    """Per sampling step."""
    leaving: list[str]
    activation_bytes: EstimateReport | None
    peak_allocated_bytes: EstimateReport | None
    available_bytes: int
    short_bytes: int


class CheckReport(TypedDict):
    fits: bool
    verdict: str
    message: str
    plan_id: str
    models: list[ModelReport]
    phases: list[PhaseReport]
    peak_phase: int | None
    assumptions: list[str]


def check_report(plan: Plan) -> CheckReport:
    """The answer of POST /api/v1/hardware/vram/check."""
    return CheckReport(
        fits=plan.runs,
        verdict=plan.verdict,
        message=plan.message,
        plan_id=plan.plan_id,
        models=[_model(model) for model in plan.models],
        phases=[_phase(planned) for planned in plan.phases],
        peak_phase=plan.peak_phase,
        assumptions=list(plan.assumptions),
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
        streamed_bytes=planned.streamed,
        leaving=list(planned.leaving),
        activation_bytes=_estimate(planned.activation),
        peak_allocated_bytes=_estimate(planned.peak),
        available_bytes=planned.available,
        short_bytes=planned.short,
    )


def _estimate(estimate: Estimate | None) -> EstimateReport | None:
    return None if estimate is None else EstimateReport(**estimate._asdict())
