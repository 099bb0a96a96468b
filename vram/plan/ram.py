"""System memory replayed beside the card: weights that are not on it, decoded frames, latents, under the container's limit.

A graph can fit a card and not its machine: two 14B experts in 16 bit take 57 GB (57.2e9 bytes) of system memory at the moment
the first has made room and the second is about to come, and what does not fit goes to the page file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from ..estimate.estimate import Estimate, Term
from ..units import say_gib
from .placing import Key

RamVerdict = Literal["fits", "tight", "does_not_fit", "unknown"]

CHANNELS: Final = 3
"""Of a picture: ComfyUI's IMAGE is frames x height x width x 3."""

ELEMENT: Final = 4
"""Bytes of one value of a picture or a latent: both are fp32 in system memory (vae_output_dtype, intermediate_dtype)."""

DECODE_COPIES: Final = 2
"""Copies of the frames while they are decoded: the VAE's output and the picture it goes into (VAE.decode, 0.8 and 0.33)."""

DECODE_COPIES_MOST: Final = 3
"""0.8 scales and clamps into new tensors (process_output), so that a third may be alive."""


class SystemMemory(NamedTuple):
    """The machine's memory at the moment of planning, in bytes."""

    total: int
    available: int
    """What programs could still have: free and what the system drops when asked (MemAvailable)."""
    limit: int | None = None
    """The container's (cgroup), if there is one."""
    limit_used: int = 0
    """Of the limit, less file pages that are dropped when asked."""
    swap_free: int = 0
    pinnable: int = 0
    """What the host may pin: 40 to 90 % of the total (ComfyUI MAX_PINNED_MEMORY); 0 where it pins nothing."""

    @property
    def room(self) -> int:
        """What can still be had without swapping."""
        if self.limit is None:
            return self.available
        return max(0, min(self.available, self.limit - self.limit_used))


class RamModel(NamedTuple):
    """One model of the graph in system memory, in bytes."""

    key: Key
    name: str
    bytes: int | None
    """All its weights, in the dtype the host keeps them in; None: not known."""
    file_bytes: int = 0
    elastic: bool = False
    """Its weights stay in the mapped file and are dropped and read again as the system likes; only pinned copies are kept."""
    patched: int = 0
    """Bytes of weights that LoRAs change: their originals stay in system memory while the patched ones are on the card."""
    lora_bytes: int = 0
    """The LoRAs themselves."""
    present: int = 0
    """What of this is in system memory already."""


class RamPhase(NamedTuple):
    """System memory while one phase runs, in bytes."""

    title: str
    loaded: Mapping[Key, int]
    """On the card, by model (Residency.after)."""
    used: frozenset[Key] = frozenset()
    """Models that this phase computes with."""
    frames: int = 0
    """Pictures that are there: inputs, and what earlier phases decoded."""
    decoding: int = 0
    """Pictures that this phase makes."""
    latents: int = 0


class RamPlan(NamedTuple):
    """System memory through a run."""

    verdict: RamVerdict
    message: str
    need: Estimate | None = None
    """The worst phase's, with a term for each model, the frames and the latents."""
    phase: str = ""
    present: int = 0
    """What of the need is there already."""
    room: int = 0
    short: int = 0
    """Bytes missing by the expected value."""
    mapped: int = 0
    """File pages that are best kept in memory too, though they may be dropped."""


def frame_bytes(width: int, height: int, frames: int, batch: int = 1) -> int:
    """Bytes of a video as ComfyUI's IMAGE, decoded: fp32, three channels."""
    return (
        _whole(width, "width")
        * _whole(height, "height")
        * _whole(frames, "frames")
        * _whole(batch, "batch")
        * CHANNELS
        * ELEMENT
    )


def latent_bytes(channels: int, frames: int, height: int, width: int, batch: int = 1) -> int:
    """Bytes of a video's latent; sizes in latent cells."""
    size = _whole(channels, "channels") * _whole(frames, "frames") * _whole(batch, "batch")
    return size * _whole(height, "height") * _whole(width, "width") * ELEMENT


def plan_ram(
    models: Iterable[RamModel],
    phases: Sequence[RamPhase],
    memory: SystemMemory | None,
    before: Mapping[Key, int] = MappingProxyType({}),
) -> RamPlan:
    """The worst phase and whether the machine has room for it; `before` is what was on the card at the start, by model.

    ComfyUI runs a loader when something needs its model soon (recorded: the second expert's after the first has sampled), so a
    model is expected from the first phase that computes with it on; the upper bound has all of them there throughout.
    """
    models = tuple(models)
    unsized = [model.name for model in models if model.bytes is None]
    if unsized:
        more = f" and {len(unsized) - 1} more" if len(unsized) > 1 else ""
        return RamPlan("unknown", f"Can't tell what system memory this takes: the size of {unsized[0]}{more} is not known.")
    if memory is None:
        return RamPlan("unknown", "Can't tell whether this fits system memory, which could not be read.")
    present = sum(model.present for model in models)
    seen: set[Key] = set()
    needs: list[tuple[Estimate, str]] = []
    for phase in phases:
        seen |= phase.used
        needs.append((_need(models, phase, before, seen, memory), phase.title))
        before = phase.loaded
    if not needs:
        return RamPlan("fits", "Takes no system memory worth telling.", room=memory.room)
    need, title = max(needs, key=lambda entry: (entry[0].expected, entry[0].upper))
    mapped = max((model.file_bytes for model in models if not model.elastic), default=0)
    mapped += sum(model.file_bytes for model in models if model.elastic)
    worst = max(estimate.upper for estimate, _ in needs)
    least = max(estimate.lower for estimate, _ in needs)
    short = max(0, need.expected - present - memory.room)
    if least - present > memory.room + memory.swap_free:
        verdict: RamVerdict = "does_not_fit"
    elif worst - present <= memory.room and need.expected - present + mapped <= memory.room:
        verdict = "fits"
    else:
        verdict = "tight"
    message = _message(verdict, need, title, present, memory, mapped)
    return RamPlan(verdict, message, need, title, present, memory.room, short, mapped)


def _need(
    models: tuple[RamModel, ...], phase: RamPhase, before: Mapping[Key, int], seen: set[Key], memory: SystemMemory
) -> Estimate:
    """Bytes of one phase that no one can drop, at its beginning: others have left the card, its own models are yet to come."""
    terms: list[Term] = []
    below = above = 0
    pins = memory.pinnable
    for model in models:
        size, loaded = model.bytes or 0, phase.loaded.get(model.key, 0)
        if model.key in phase.used and not model.elastic:
            loaded = min(loaded, before.get(model.key, 0))
        off = max(0, size - loaded)
        if model.key not in seen and not model.present:
            above += model.lora_bytes + (0 if model.elastic else off)
            continue
        if model.elastic:
            # pinned copies of what streams; they are let go when memory is short
            pinned = min(off, pins)
            pins -= pinned
            terms.append(Term(f"{model.name}, pinned", pinned))
            below += pinned
        else:
            # which of a model's weights are on the card is not told here, so neither is how many of them are patched
            patched = min(model.patched, phase.loaded.get(model.key, 0))
            kept = patched * phase.loaded.get(model.key, 0) // size if size else 0
            terms.append(Term(model.name, off + kept))
            above += patched - kept if kept < patched else 0
            below += kept
        terms.append(Term(f"LoRAs of {model.name}", model.lora_bytes))
    terms.append(Term("frames", phase.frames + phase.decoding * DECODE_COPIES))
    terms.append(Term("latents", phase.latents))
    below += phase.decoding * (DECODE_COPIES - 1)
    above += phase.decoding * (DECODE_COPIES_MOST - DECODE_COPIES)
    return Estimate.of(terms, below=below, above=above)


def _message(verdict: RamVerdict, need: Estimate, title: str, present: int, memory: SystemMemory, mapped: int) -> str:
    new = max(0, need.expected - present)
    where = "of this machine's system memory" if memory.limit is None else "of the container's memory"
    size = memory.total if memory.limit is None else min(memory.total, memory.limit)
    takes = f"{title} takes {say_gib(new)} more {where}; {say_gib(memory.room)} of {say_gib(size)} is free."
    missing = new - memory.room
    if verdict == "fits":
        return takes
    if missing <= 0:
        return f"{takes} That leaves too little to keep the {say_gib(mapped)} of model files in memory: they are read again."
    if verdict == "does_not_fit":
        return f"{takes} Short by {say_gib(missing)}, more than the page file has: the system will end ComfyUI."
    if missing <= memory.swap_free:
        return f"{takes} {say_gib(missing)} would go to the page file, which is slower by far than any offloading."
    return f"{takes} Short by {say_gib(missing)}."


def _whole(value: int, name: str) -> int:
    if value < 0:
        raise ValueError(f"{name} must not be negative, not {value}")
    return value
