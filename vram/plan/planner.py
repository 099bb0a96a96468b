"""Chain + card + what is already loaded -> Plan: peaks, verdict and a message a person understands."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Final

from ..estimate import wan
from ..units import say_gib
from .residency import Need, Replay, match_held
from .sources import MODEL_TYPES
from .types import Card, Chain, Estimate, HeldModel, HostRules, ModelRef, Phase, PhasePlan, Plan, Verdict

BATCHING_FACTOR: Final = 1.5
"""cond and uncond run as one batch when 1.5 times its memory is free (ComfyUI comfy/samplers.py)."""

FORMULAS: Final = "activations are ComfyUI's own estimates: what it makes room for, up to 2.25 times what tensors really use"


def make_plan(chain: Chain, card: Card | None, rules: HostRules, held: Iterable[HeldModel] = ()) -> Plan:
    """Replay `chain` on `card`. Deterministic: equal arguments give an equal Plan. A None card gives `unknown`."""
    if card is None:
        none = Card("no accelerator", 0, 0)
        message = "No accelerator was found, so there is no card to fit on: the graph runs in system memory."
        return Plan(_plan_id(chain, none), "unknown", message, none, (), chain.models, None, chain.assumptions)
    held = tuple(held)
    loaded = {key: model.bytes_on_card for key, model in match_held(chain.models, held).items()}
    replay = Replay(card, rules, held, chain.models)
    phases = tuple(_plan_phase(phase, replay, rules) for phase in chain.phases)
    peak_phase = max(
        (index for index, planned in enumerate(phases) if planned.activation is not None),
        key=lambda index: (phases[index].short, _pressing(phases[index])),
        default=None,
    )
    reasons = chain.unknown or _unsized(phases)
    verdict = _verdict(phases, reasons)
    notes = [*chain.assumptions]
    if phases:
        notes.append(FORMULAS)
    if any(planned.phase.kind == "vae_decode" and planned.short for planned in phases):
        notes.append("when a VAE decode runs out of memory ComfyUI tries again in tiles, which may still succeed")
    return Plan(
        plan_id=_plan_id(chain, card),
        verdict=verdict,
        message=_message(verdict, phases, peak_phase, card, reasons),
        card=card,
        phases=phases,
        models=chain.models,
        peak_phase=peak_phase,
        assumptions=tuple(notes),
        new_bytes=max((_phase_bytes(phase, rules, loaded) for phase in chain.phases), default=0),
    )


def chain_bytes(chain: Chain, rules: HostRules) -> int:
    """What the largest phase takes with all its weights in place: phases follow one another, so they do not add up."""
    return max((_phase_bytes(phase, rules, {}) for phase in chain.phases), default=0)


def chain_overhead(chain: Chain) -> int:
    """What its largest video keeps beside weights and the activations of a forward: the latents of a sampling step."""
    return max(
        (
            wan.video_runtime_overhead(width=phase.width, height=phase.height, frames=phase.frames).total
            for phase in chain.phases
            if phase.kind == "sample" and phase.width and phase.height and phase.frames
        ),
        default=0,
    )


def _phase_bytes(phase: Phase, rules: HostRules, loaded: Mapping[tuple[str, str, str], int]) -> int:
    """Bytes of a phase that are not on the card yet: weights less what is `loaded` of them (by key), and activations."""
    weights = sum(max(0, (model.resident_bytes or 0) - loaded.get(model.key, 0)) for model in phase.models if model.on_card)
    estimate = activation(phase, rules)
    return weights + (estimate.expected if estimate else 0)


def _unsized(phases: tuple[PhasePlan, ...]) -> tuple[str, ...]:
    """One sentence for all phases whose need is not known, however many."""
    names = [
        f"{planned.phase.title} (node {planned.phase.node_id})"
        for planned in phases
        if planned.activation is None and planned.phase.kind != "other"
    ]
    if not names:
        return ()
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (f"what {names[0]}{rest} need{'' if rest else 's'} is not known before the graph runs",)


def _plan_phase(phase: Phase, replay: Replay, rules: HostRules) -> PhasePlan:
    single = activation(phase, rules, forwards=1)
    double = activation(phase, rules, forwards=2)
    residency = replay.phase(
        Need(phase.models, minimum=single.expected if single else 0, wanted=double.expected if double else 0)
    )
    # ComfyUI batches cond and uncond only if that fits beside the weights it has just placed
    batched = phase.kind == "sample" and _negative(phase) and double and double.expected * BATCHING_FACTOR < residency.free
    taken = double if batched else single
    forwards = 2 if phase.kind == "sample" and _negative(phase) and not batched else 1
    return PhasePlan(
        phase=phase,
        resident=residency.resident,
        streamed=residency.offloaded * forwards,
        leaving=residency.leaving,
        activation=taken,
        available=residency.available,
        peak=taken.plus(residency.resident + residency.others) if taken else None,
    )


def _negative(phase: Phase) -> bool:
    return phase.cfg is None or not math.isclose(phase.cfg, 1.0)


def activation(phase: Phase, rules: HostRules, forwards: int = 1) -> Estimate | None:
    """Bytes a phase needs beside its weights, for one forward or for cond and uncond together; None if unknown."""
    if phase.kind != "other" and phase.models and not any(model.on_card for model in phase.models):
        return Estimate(0, 0, 0)
    match phase.kind:
        case "text_encode":
            return Estimate(wan.TEXT_ENCODER_ACTIVATION, wan.TEXT_ENCODER_ACTIVATION, wan.TEXT_ENCODER_ACTIVATION_LONG)
        case "clip_vision":
            return Estimate(wan.CLIP_VISION_ACTIVATION, wan.CLIP_VISION_ACTIVATION, 2 * wan.CLIP_VISION_ACTIVATION)
        case "other":
            return None
    if phase.width is None or phase.height is None or phase.frames is None or not phase.models:
        return None
    stride = _stride(phase.models)
    if phase.kind == "sample":
        # of several generators at one sampler the widest decides
        factors = [model.usage_factor for model in phase.models if model.usage_factor is not None]
        if not factors:
            return None
        expected = wan.dit_memory_required(
            batch=forwards * (phase.batch or 1),
            frames=phase.frames,
            height=phase.height,
            width=phase.width,
            stride=stride,
            usage_factor=max(factors),
            element_bytes=rules.compute_bytes,
            flash=rules.flash_attention,
        )
        return _bounded(expected, wan.DIT_OVERSTATEMENT, wan.DIT_UNDERSTATEMENT)
    size = wan.vae_decode_required if phase.kind == "vae_decode" else wan.vae_encode_required
    expected = size(
        frames=phase.frames,
        height=phase.height,
        width=phase.width,
        stride=stride,
        element_bytes=rules.vae_compute_bytes,
    )
    return _bounded(expected, wan.VAE_OVERSTATEMENT, wan.VAE_UNDERSTATEMENT)


def _bounded(expected: int, over: float, under: float) -> Estimate:
    return Estimate(expected, round(expected / over), round(expected * under))


def _stride(models: tuple[ModelRef, ...]) -> int:
    return next((model.spatial_stride for model in models if model.spatial_stride), 8)


def _pressing(planned: PhasePlan) -> int:
    return planned.activation.expected + planned.resident if planned.activation else 0


def _verdict(phases: tuple[PhasePlan, ...], reasons: tuple[str, ...]) -> Verdict:
    if any(planned.short for planned in phases):
        return "does_not_fit"
    if reasons or not phases:
        return "unknown"
    return "fits_with_offload" if any(planned.streamed or planned.leaving for planned in phases) else "fits"


def _message(
    verdict: Verdict, phases: tuple[PhasePlan, ...], peak_phase: int | None, card: Card, reasons: tuple[str, ...]
) -> str:
    match verdict:
        case "does_not_fit" if peak_phase is not None:
            worst = phases[peak_phase]
            needed = worst.activation.expected if worst.activation else 0
            after = " after the sampling is done" if worst.phase.kind == "vae_decode" else ""
            return (
                f"{worst.phase.title} (node {worst.phase.node_id}) needs about {say_gib(needed)}{_at(worst.phase)} beside "
                f"its weights; {say_gib(worst.available)} of this card's {say_gib(card.total)} can be free then. "
                f"Short by {say_gib(worst.short)}{after}."
            )
        case "fits_with_offload":
            return _offload_message(phases)
        case "fits" if peak_phase is not None:
            peak = max((planned.peak.expected for planned in phases if planned.peak), default=0)
            return f"Fits: at most {say_gib(peak)} of this card's {say_gib(card.total)}, with all weights in place."
    if not phases and not reasons:
        known = ", ".join(MODEL_TYPES)
        return f"No model of a type this check knows ({known}) reaches a node of this graph, so it can't be checked."
    return "Can't tell whether this fits: " + "; ".join(reasons) + "."


def _offload_message(phases: tuple[PhasePlan, ...]) -> str:
    parts: list[str] = []
    for planned in phases:
        if planned.streamed:
            per = " per step" if planned.phase.kind == "sample" else ""
            weights = sum(model.resident_bytes or 0 for model in planned.phase.models if model.on_card)
            parts.append(
                f"{planned.phase.title} keeps {say_gib(planned.resident)} of {say_gib(weights)} on the card and streams "
                f"{say_gib(planned.streamed)}{per}"
            )
    if not parts:
        leaving = list(dict.fromkeys(name for planned in phases for name in planned.leaving))
        verb = "leaves" if len(leaving) == 1 else "leave"
        return f"Runs on this card, one model after the other: {', '.join(leaving)} {verb} to make room; nothing streams."
    return "Runs on this card. " + "; ".join(dict.fromkeys(parts)) + "."


def _at(phase: Phase) -> str:
    frames = f", {phase.frames} frames" if phase.frames and phase.frames > 1 else ""
    return f" at {phase.width}×{phase.height}{frames}"


def _plan_id(chain: Chain, card: Card) -> str:
    return hashlib.sha256(repr((chain, card)).encode()).hexdigest()[:16]
