"""A Plan as the JSON that the REST answer, the dialog and scripts read. Field names are kept stable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypedDict

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


CACHES: Final = ("keys and values of the video", "keys and values of the text", "cached pose activations")
"""Terms of what a sampler keeps from step to step (estimate/caches.py, needs.py)."""


class ModelReport(TypedDict):
    node_id: str
    """Of its loader."""
    role: str
    """generator, text_encoder, vae, clip_vision, lora or other."""
    file: str
    bytes: int | None
    """Sum of the file's tensors; null when the file can't be read."""
    resident_bytes: int | None
    """On the card, fully loaded with this graph's options; 0 for a LoRA, which is merged."""
    architecture: str


class PhaseReport(TypedDict):
    kind: str
    """text_encode, clip_vision, vae_encode, audio_encode, sample, vae_decode or other."""
    node_ids: list[str]
    title: str
    models: list[str]
    """Files, as the loaders' widgets name them."""
    loras: list[str]
    width: int | None
    """Pixels; null where no size has to do with it, or none is known before it runs."""
    height: int | None
    frames: int | None
    """Of the video that the latent stands for, a reference frame inside it included."""
    batch: int | None
    steps: int | None
    """Of a sampler, those it runs itself."""
    cfg: float | None
    """1: no negative prompt runs."""
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
    """They sum to its expected value."""
    cache_bytes: int
    """Of it, what is kept from step to step."""
    peak_allocated_bytes: EstimateReport | None
    """Of everything the host holds: what must fit."""
    peak_reserved_bytes: EstimateReport | None
    """What a monitor will show; null where the allocator was not simulated."""
    reserve_bytes: int
    """What the host leaves free on top."""
    other_programs_bytes: int
    """Of the card, held by others."""
    available_bytes: int
    """What the activations can have."""
    short_bytes: int
    """Missing, by the expected value; 0 when it runs."""


class RamReport(TypedDict):
    verdict: str
    """fits, tight (files are read again, or the page file is used), does_not_fit or unknown."""
    message: str
    needed_bytes: int | None
    """Beyond what is in memory now."""
    available_bytes: int | None


class CardReport(TypedDict):
    name: str
    total_bytes: int
    free_bytes: int
    """Free for anybody, as the driver says."""


class CheckReport(TypedDict):
    fits: bool
    """The graph runs: true for every verdict but `does_not_fit`."""
    verdict: str
    """fits, fits_with_offload, does_not_fit or unknown."""
    message: str
    """For a person."""
    plan_id: str
    """Equal for plans made of equal things: graph, files, card, host and what is loaded."""
    card: CardReport
    ram: RamReport | None
    models: list[ModelReport]
    phases: list[PhaseReport]
    peak_phase: int | None
    """Index of the phase that decides."""
    bus_bytes: int
    """Weights over the bus in the whole run."""
    bus_seconds: float | None
    """What they add; null unless a bandwidth was measured."""
    fixes: list[FixReport]
    """What would make it fit, best first."""
    assumptions: list[str]
    """What had to be assumed, in sentences."""


def check_report(plan: Plan, fixes: Iterable[FixReport] = (), bus_bytes_per_second: int | None = None) -> CheckReport:
    """The answer of POST /api/v1/hardware/vram/check. `bus_bytes_per_second`: as it was measured, or None."""
    return CheckReport(
        fits=plan.runs,
        verdict=plan.verdict,
        message=plan.message,
        plan_id=plan.plan_id,
        card=_card(plan.card),
        ram=None if plan.ram is None else _ram(plan.ram),
        models=[_model(model) for model in plan.models],
        phases=[_phase(planned, plan) for planned in plan.phases],
        peak_phase=plan.peak_phase,
        bus_bytes=plan.bus_bytes,
        bus_seconds=plan.bus_bytes / bus_bytes_per_second if bus_bytes_per_second else None,
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


def _phase(planned: PhasePlan, plan: Plan) -> PhaseReport:
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
        cache_bytes=sum(term.bytes for term in _terms(planned) if term.name in CACHES),
        peak_allocated_bytes=_estimate(planned.peak),
        peak_reserved_bytes=_estimate(planned.peak_reserved),
        reserve_bytes=plan.reserve,
        other_programs_bytes=plan.other_programs,
        available_bytes=planned.available,
        short_bytes=planned.short,
    )


def _terms(planned: PhasePlan) -> tuple[Term, ...]:
    return planned.activation.terms if planned.activation else ()


def _estimate(estimate: Estimate | None) -> EstimateReport | None:
    if estimate is None:
        return None
    return EstimateReport(expected=estimate.expected, lower=estimate.lower, upper=estimate.upper)
