"""What a file is and what it takes on the card, remembered: a header is weighed once for each way of loading it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Final, NamedTuple

from ..estimate import footprint
from ..estimate.architecture import Architecture, identify
from ..estimate.backend import parse_version
from ..estimate.checkpoint import Checkpoint
from ..estimate.detection import HostDetection
from ..estimate.footprint import Footprint, LoadRules
from .modules import Module
from .types import Card, HostRules, ModelRole

KEPT: Final = 96
"""Answers remembered: a dozen files in a few ways of loading. Weighing one of 2,000 tensors takes about 10 ms."""

NOT_CASTABLE: Final = ("layer_norm",)
"""What the names of T5's norms end with: no layer of ComfyUI's, so they cannot compute from off the card."""

Detect = Callable[[Checkpoint], HostDetection | None]
"""The host's own detection, for what is no WAN model."""


def no_detection(checkpoint: Checkpoint) -> HostDetection | None:
    """There is no host to ask."""
    return None


class Load(NamedTuple):
    """A way of loading a file."""

    role: ModelRole
    weight_dtype: str
    patched: bool
    rules: LoadRules


class Sized(NamedTuple):
    """What a file is, and what it takes when it is loaded that way."""

    architecture: Architecture
    footprint: Footprint
    modules: tuple[Module, ...]
    detected: HostDetection | None
    file_bytes: int
    """Of all its tensors as they lie in the file."""


def load_rules(rules: HostRules, card: Card) -> LoadRules:
    """What of the host and the card decides how weights are kept."""
    return LoadRules(
        weight_bytes=rules.backend.weight_bytes or rules.compute_bytes,
        compute_bytes=rules.compute_bytes,
        fp8_compute=rules.fp8_compute,
        block_compute=rules.block_compute,
        card_total=card.total,
        minimum_inference=rules.minimum_inference_bytes,
        streams=rules.offload_streams,
        vae_bytes=rules.vae_compute_bytes,
        comfyui=parse_version(rules.version),
    )


class Sizing:
    """Weighs headers. Threads may share it."""

    def __init__(self, detect: Detect = no_detection, size: int = KEPT) -> None:
        self._detect = detect
        self._size = size
        self._lock = Lock()
        self._kept: OrderedDict[tuple[int, Load], tuple[Checkpoint, Sized]] = OrderedDict()

    def of(self, checkpoint: Checkpoint, load: Load) -> Sized:
        """Equal headers may be weighed twice, the same object is not. Raises ValueError for sizes that cannot be."""
        key = (id(checkpoint), load)
        with self._lock:
            kept = self._kept.get(key)
            # the object is kept with its answer, so that no other can take its id meanwhile
            if kept is not None and kept[0] is checkpoint:
                self._kept.move_to_end(key)
                return kept[1]
        sized = self._weigh(checkpoint, load)
        with self._lock:
            self._kept[key] = (checkpoint, sized)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return sized

    def _weigh(self, checkpoint: Checkpoint, load: Load) -> Sized:
        architecture = identify(checkpoint)
        match load.role:
            case "generator":
                found = footprint.diffusion_model(
                    checkpoint, weight_dtype=load.weight_dtype, rules=load.rules, patched=load.patched
                )
            case "text_encoder":
                found = footprint.text_encoder(checkpoint, rules=load.rules)
            case "clip_vision":
                found = footprint.clip_vision(checkpoint, rules=load.rules)
            case _:
                found = footprint.vae(checkpoint, rules=load.rules)
        detected = None
        if load.role == "generator" and architecture.kind != "dit":
            detected = self._detect(checkpoint)
        modules = tuple(
            Module(module.bytes, module.offload_bytes, not module.name.endswith(NOT_CASTABLE)) for module in found.modules
        )
        return Sized(architecture, found, modules, detected, checkpoint.tensor_bytes)
