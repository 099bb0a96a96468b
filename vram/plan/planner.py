"""Chain + card + what is already loaded -> Plan: peaks, verdict and a message a person understands."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from ..estimate.estimate import Estimate
from ..estimate.overheads import reserved
from ..estimate.sampling import batches_cond_and_uncond
from ..estimate.vae import clips_at_once
from ..units import say_gib
from .needs import PhaseNeed, backend_of, family_of, largest_tiles, need_of, pose_cache_bytes, runs_uncond
from .ours import DECODE
from .placing import Key
from .ram import RamModel, RamPhase, RamPlan, SystemMemory, frame_bytes, latent_bytes, plan_ram
from .residency import Need, Replay, Residency, Weights, match_held
from .sources import MODEL_TYPES
from .types import Card, Chain, Earlier, HeldModel, HostRules, ModelRef, Phase, PhasePlan, Plan, Tile, Verdict

QUEUED: Final = "planned from what the prompts before it in the queue will leave on the card"

TIGHT: Final = "the margin is thin: by its upper bound this does not fit"


def make_plan(
    chain: Chain,
    card: Card | None,
    rules: HostRules,
    held: Iterable[HeldModel] = (),
    memory: SystemMemory | None = None,
    pinned: Collection[Key] = (),
    before: Sequence[Earlier] = (),
) -> Plan:
    """Replay `chain` on `card`. Deterministic: equal arguments give an equal Plan. A None card gives `unknown`.

    `memory` is the system's; None leaves it out of the plan. `pinned` are models that a policy keeps on the card, `before` the
    prompts that run first, in their order: the chain starts from what they leave.
    """
    if card is None:
        none = Card("no accelerator", 0, 0)
        message = "No accelerator was found, so there is no card to fit on: the graph runs in system memory."
        return Plan(_plan_id(chain, none), "unknown", message, none, (), chain.models, None, chain.assumptions)
    rules = replace(rules, card_total=card.total)
    held = tuple(held)
    matched = match_held(chain.models, held)
    known = dict.fromkeys((*chain.models, *(model for earlier in before for model in earlier.chain.models)))
    pins = frozenset(pinned).union(*(earlier.pinned for earlier in before))
    replay = Replay(card, rules, held, known, pins)
    for earlier in before:
        _run(earlier, replay, rules)
    loaded = replay.loaded if before else {key: model.bytes_on_card for key, model in matched.items()}
    needs = tuple(need_of(phase, rules) for phase in chain.phases)
    planned: list[PhasePlan] = []
    states: list[Mapping[Key, int]] = []
    for phase, need in zip(chain.phases, needs, strict=True):
        found, residency = _plan_phase(phase, need, replay, rules)
        planned.append(found)
        states.append(dict(residency.after))
    phases = tuple(planned)
    peak_phase = max(
        (index for index, found in enumerate(phases) if found.activation is not None),
        key=lambda index: (phases[index].short, _pressing(phases[index])),
        default=None,
    )
    reasons = chain.unknown or _unsized(phases)
    # a host without one of its node classes refuses the graph, and what such a node changes is anybody's guess
    verdict: Verdict = "unknown" if chain.missing else "fits" if chain.nothing_to_do else _verdict(phases, reasons)
    return Plan(
        plan_id=_plan_id(chain, card, rules, held, sorted(pins), [_outline(earlier) for earlier in before]),
        verdict=verdict,
        message=_message(verdict, phases, peak_phase, card, reasons),
        card=card,
        phases=phases,
        models=chain.models,
        peak_phase=peak_phase,
        assumptions=(*_queued(before), *_assumptions(chain, phases)),
        new_bytes=max((_new_bytes(phase, need, loaded) for phase, need in zip(chain.phases, needs, strict=True)), default=0),
        reserve=rules.reserve_bytes if rules.patchers == "legacy" else rules.headroom_bytes,
        other_programs=max(0, card.total - card.free - sum(model.bytes_on_card for model in held)),
        settled=chain.whole and not (chain.phases or chain.models or chain.unknown or chain.missing),
        ram=None if memory is None else _ram(chain, phases, states, loaded, memory, rules),
    )


def _run(earlier: Earlier, replay: Replay, rules: HostRules) -> None:
    """What a prompt that runs first does to the card."""
    for phase in earlier.chain.phases:
        _plan_phase(phase, need_of(phase, rules), replay, rules)
    replay.leave(earlier.leaves)


def _queued(before: Sequence[Earlier]) -> tuple[str, ...]:
    return (QUEUED,) if before else ()


def chain_bytes(chain: Chain, rules: HostRules) -> int:
    """What the largest phase takes with all its weights in place: phases follow one another, so they do not add up."""
    return max((_new_bytes(phase, need_of(phase, rules), {}) for phase in chain.phases), default=0)


def _new_bytes(phase: Phase, need: PhaseNeed, loaded: Mapping[Key, int]) -> int:
    """Bytes of a phase that are not on the card yet: weights less what is `loaded` of them (by key), and activations."""
    weights = sum(max(0, (model.resident_bytes or 0) - loaded.get(model.key, 0)) for model in phase.models if model.on_card)
    return weights + (need.required.expected if need.required else 0)


def _assumptions(chain: Chain, phases: tuple[PhasePlan, ...]) -> tuple[str, ...]:
    said = [*chain.assumptions]
    for planned in phases:
        said += planned.activation.assumptions if planned.activation else ()
        if planned.phase.own_placement:
            said.append(f"{planned.phase.title} runs WanVideoWrapper's own code: its weights are placed by its own settings")
    for planned in phases:
        if planned.tiled is not None:
            said.append(
                f"{planned.phase.title} does not fit whole: ComfyUI runs out of memory and tries again in tiles of "
                f"{planned.tiled.size} px, which may leave faint seams"
            )
    if any(not planned.short and planned.activation and planned.activation.upper > planned.available for planned in phases):
        said.append(TIGHT)
    return tuple(dict.fromkeys(said))


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


def _plan_phase(phase: Phase, need: PhaseNeed, replay: Replay, rules: HostRules) -> tuple[PhasePlan, Residency]:
    if phase.own_placement:
        return _place_itself(phase, need, replay, rules)
    residency = replay.phase(
        Need(
            models=phase.models,
            minimum=need.host,
            wanted=need.host_batched,
            weights={model.key: _weights(model) for model in phase.models},
            lower=need.required.lower if need.required else None,
            upper=need.required.upper if need.required else None,
        )
    )
    at_once = _clips_at_once(phase, need, residency.free)
    if at_once > 1:
        need = need_of(phase, rules, at_once)
    # ComfyUI batches cond and uncond only if that fits beside the weights it has just placed
    uncond = runs_uncond(phase)
    batched = uncond and batches_cond_and_uncond(need.host_batched, residency.free)
    activation = need.batched if batched else need.required
    if activation is not None and residency.offloaded:
        placed = dict(residency.after)
        on_their_way = sum(_on_its_way(model, placed.get(model.key, 0), rules.offload_streams) for model in phase.models)
        activation = activation.plus(on_their_way, "weights on their way to the card")
    if activation is not None:
        activation = _with_unpacking(activation, phase)
    # legacy weights stay where they were placed: what they leave free is all there is; elastic ones give way
    available = residency.available if rules.patchers == "dynamic" else min(residency.available, residency.free)
    tiled = None
    if activation is not None and need.fallback is not None and activation.expected > available:
        ours = None
        if phase.class_type == DECODE and activation.lower > available:
            ours = largest_tiles(phase, rules, available)
        # out of memory in a whole encode or decode makes ComfyUI try again in tiles
        tiled, activation = ours or (need.fallback_tile, need.fallback)
    forwards = 2 if uncond and not batched else 1
    streamed = residency.offloaded * forwards
    found = _phase_plan(phase, activation, residency, residency.resident, streamed, available, rules, batched, tiled)
    return replace(found, at_once=at_once), residency


def _clips_at_once(phase: Phase, need: PhaseNeed, free: int) -> int:
    """As many clips of a batch as ComfyUI's own figure for one lets a VAE do together; tiled ones are done in turn."""
    batch = phase.batch or 1
    if phase.kind not in ("vae_decode", "vae_encode") or batch < 2 or not need.host or phase.tile is not None:
        return 1
    return clips_at_once(free, need.host, batch)


def _place_itself(phase: Phase, need: PhaseNeed, replay: Replay, rules: HostRules) -> tuple[PhasePlan, Residency]:
    """WanVideoWrapper sends all of ComfyUI's models away and keeps its own where its settings say."""
    replay.empty()
    residency = replay.phase(Need((), minimum=0, wanted=0))
    resident = sum(_kept_by_itself(model, phase.blocks_to_swap or 0) for model in phase.models if model.on_card)
    weights = sum(model.resident_bytes or 0 for model in phase.models if model.on_card)
    available = max(0, residency.available - resident)
    forwards = 2 if runs_uncond(phase) else 1
    swapped = max(0, weights - resident) * forwards
    return _phase_plan(phase, need.required, residency, resident, swapped, available, rules, False, None), residency


def _kept_by_itself(model: ModelRef, blocks_to_swap: int) -> int:
    """Bytes that stay on the card with so many blocks swapped; the one that is computed with is there as well."""
    size, layers = model.resident_bytes or 0, model.arch.layers or 0
    if model.role != "generator" or not layers:
        return size
    swapped = min(blocks_to_swap, layers)
    return size - size * max(0, swapped - 1) // layers


def _on_its_way(model: ModelRef, placed: int, streams: int) -> int:
    """Bytes of the layer that is computed with and of those fetched ahead, of what is not on the card. What ComfyUI itself
    counts for them (Residency.buffer) has a cast copy of each in it, which the forward's own form knows better."""
    left = list(model.modules)
    for index, module in enumerate(model.modules):
        if module.bytes > placed:
            left = left[index : index + 1 + streams]
            return sum(other.bytes for other in left)
        placed -= module.bytes
    return 0


def _weights(model: ModelRef) -> Weights:
    # ComfyUI-GGUF brings a patcher of its own, which is never elastic
    return Weights(model.modules, model.patches, False if model.path.lower().endswith(".gguf") else None)


def _with_unpacking(activation: Estimate, phase: Phase) -> Estimate:
    """What layers are unpacked into while they run, where the forward's own form does not count it (GGUF, foreign models)."""
    for model in phase.models:
        kept = model.footprint
        if kept is not None and model.on_card and kept.cast == "dequantise" and (kept.packed or model.arch.kind != "dit"):
            for term in kept.transients:
                activation = activation.plus(term.bytes, term.name)
    return activation


def _phase_plan(
    phase: Phase,
    activation: Estimate | None,
    residency: Residency,
    resident: int,
    streamed: int,
    available: int,
    rules: HostRules,
    batched: bool,
    tiled: Tile | None,
) -> PhasePlan:
    held = resident + residency.others
    peak = activation.plus(held, "weights") if activation else None
    shown = _reserved(activation, phase, rules)
    return PhasePlan(
        phase=phase,
        resident=resident,
        streamed=streamed,
        leaving=residency.leaving,
        activation=activation,
        available=available,
        peak=peak,
        peak_reserved=shown.plus(held, "weights") if shown else None,
        others=residency.others,
        batched=batched,
        tiled=tiled,
    )


def _reserved(activation: Estimate | None, phase: Phase, rules: HostRules) -> Estimate | None:
    """What the allocator will have taken for it; None where that was not simulated."""
    family = family_of(phase)
    if activation is None or family is None:
        return None
    found = reserved(activation, family, backend_of(phase, rules), one_frame=phase.frames == 1)
    # a monitor shows no more than there is: the allocator gives back what it caches before it fails
    return None if found is None else replace(found, purpose="observed")


def _pressing(planned: PhasePlan) -> int:
    return planned.activation.expected + planned.resident if planned.activation else 0


def _ram(
    chain: Chain,
    phases: tuple[PhasePlan, ...],
    states: list[Mapping[Key, int]],
    loaded: Mapping[Key, int],
    memory: SystemMemory,
    rules: HostRules,
) -> RamPlan:
    """System memory through the run: models off the card, what was decoded, latents."""
    loras: dict[Key, int] = {}
    for planned in phases:
        for model in planned.phase.models:
            loras[model.key] = sum(lora.file_bytes or 0 for lora in planned.phase.loras)
    models = [
        RamModel(
            key=model.key,
            name=model.file,
            bytes=model.resident_bytes,
            file_bytes=model.file_bytes or 0,
            elastic=rules.patchers == "dynamic" and not model.path.lower().endswith(".gguf"),
            patched=(model.resident_bytes or 0) if loras.get(model.key) else 0,
            lora_bytes=loras.get(model.key, 0),
            present=model.resident_bytes or 0 if model.key in loaded else 0,
        )
        for model in chain.models
        if model.role != "lora"
    ]
    made = 0
    steps: list[RamPhase] = []
    for planned, state in zip(phases, states, strict=True):
        phase = planned.phase
        size = (phase.width, phase.height, phase.frames)
        pictures = latents = 0
        if None not in size and phase.kind in ("vae_encode", "vae_decode", "sample"):
            width, height, frames = (side or 0 for side in size)
            if phase.kind == "sample":
                kept = phase.pose_cache is not None and not phase.pose_cache.on_card
                latents = pose_cache_bytes(phase, rules) if kept else 0
                latents += latent_bytes(16, (frames - 1) // 4 + 1, height // 8, width // 8, phase.batch or 1)
            else:
                pictures = frame_bytes(width, height, frames, phase.batch or 1)
        decoding = pictures if phase.kind == "vae_decode" else 0
        used = frozenset(model.key for model in phase.models)
        encoding = pictures if phase.kind == "vae_encode" else 0
        steps.append(RamPhase(phase.title, state, used, made + encoding, decoding, latents))
        made += decoding
    return plan_ram(models, steps, memory, loaded)


def _verdict(phases: tuple[PhasePlan, ...], reasons: tuple[str, ...]) -> Verdict:
    if any(planned.short for planned in phases):
        return "does_not_fit"
    if reasons or not phases:
        return "unknown"
    eased = any(planned.streamed or planned.leaving or planned.tiled for planned in phases)
    return "fits_with_offload" if eased else "fits"


def _message(
    verdict: Verdict, phases: tuple[PhasePlan, ...], peak_phase: int | None, card: Card, reasons: tuple[str, ...]
) -> str:
    match verdict:
        case "does_not_fit" if peak_phase is not None:
            return say_shortage(phases[peak_phase], card)
        case "fits_with_offload":
            return _offload_message(phases)
        case "fits" if not phases:
            return "Fits: nothing has to be computed, the results of the last run are still there."
        case "fits" if peak_phase is not None:
            peak = max((planned.peak.expected for planned in phases if planned.peak), default=0)
            return f"Fits: at most {say_gib(peak)} of this card's {say_gib(card.total)}, with all weights in place."
    if not phases and not reasons:
        known = ", ".join(MODEL_TYPES)
        return f"No model of a type this check knows ({known}) reaches a node of this graph, so it can't be checked."
    return "Can't tell whether this fits: " + "; ".join(reasons) + "."


def say_shortage(planned: PhasePlan, card: Card) -> str:
    """What a phase that does not fit needs, what it can have, and what is missing."""
    needed = planned.activation.expected if planned.activation else 0
    after = " after the sampling is done" if planned.phase.kind == "vae_decode" else ""
    return (
        f"{planned.phase.title} (node {planned.phase.node_id}) needs about {say_gib(needed)}{_at(planned.phase)} beside "
        f"its weights; {say_gib(planned.available)} of this card's {say_gib(card.total)} can be free then. "
        f"Short by {say_gib(planned.short)}{after}."
    )


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
        if planned.tiled is not None:
            parts.append(f"{planned.phase.title} does not fit whole and is done in tiles of {planned.tiled.size} px")
    if not parts:
        leaving = list(dict.fromkeys(name for planned in phases for name in planned.leaving))
        verb = "leaves" if len(leaving) == 1 else "leave"
        return f"Runs on this card, one model after the other: {', '.join(leaving)} {verb} to make room; nothing streams."
    return "Runs on this card. " + "; ".join(dict.fromkeys(parts)) + "."


def _at(phase: Phase) -> str:
    if phase.width is None or phase.height is None:
        return ""
    frames = f", {phase.frames} frames" if phase.frames and phase.frames > 1 else ""
    return f" at {phase.width}×{phase.height}{frames}"


def _outline(earlier: Earlier) -> tuple[object, ...]:
    phases = tuple((phase.node_id, phase.width, phase.height, phase.frames) for phase in earlier.chain.phases)
    return (phases, tuple(model.key for model in earlier.chain.models), sorted(earlier.leaves))


def _plan_id(*made_of: object) -> str:
    """Equal for plans made of equal things."""
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
