"""Replays the host's own load and evict rules over a chain: what is on the card in each phase, what leaves, what streams.

Legacy rules are ComfyUI's load_models_gpu and free_memory (comfy/model_management.py). Its order among equals depends on Python
reference counts; here equals leave smallest first. Dynamic rules are comfy-aimdo's: weights take what activations leave free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from .types import Card, HeldModel, HostRules, ModelRef

LOAD_FACTOR: Final = 1.1
"""ComfyUI frees 1.1 times the weights it is about to load (load_models_gpu)."""


class Need(NamedTuple):
    """What one phase asks of the card, in bytes."""

    models: tuple[ModelRef, ...]
    minimum: int
    """Activations of the smallest forward: what weights must leave free."""
    wanted: int
    """Activations ComfyUI would like room for: what others are evicted for."""


class Residency(NamedTuple):
    """The card during one phase, in bytes."""

    resident: int
    """This phase's weights on the card."""
    offloaded: int
    """This phase's weights that are not: they stream through in each forward."""
    others: int
    """Weights of other models still there."""
    leaving: tuple[str, ...]
    available: int
    """What activations could have, less the margin, if every weight that can leave did."""
    free: int
    """What the host sees free once it has placed the weights."""


@dataclass(slots=True)
class _Held:
    key: tuple[str, str, str]
    name: str
    size: int
    loaded: int


class Replay:
    """The card through a run. Feed it the phases in order."""

    def __init__(self, card: Card, rules: HostRules, held: Iterable[HeldModel] = (), models: Iterable[ModelRef] = ()) -> None:
        self._rules = rules
        held = [model for model in held if model.bytes_on_card > 0]
        known = {id(found): key for key, found in match_held(models, held).items()}
        self._held: list[_Held] = [
            _Held(known.get(id(model), (f"held {index}", "", "")), model.name, model.bytes, model.bytes_on_card)
            for index, model in enumerate(held)
        ]
        loaded = sum(model.loaded for model in self._held)
        self._capacity = max(0, min(card.free + loaded, card.total))
        """What weights and activations share: all but other programs and the context."""
        # the host knows nothing of our margin and places weights in it; only what we promise leaves it out
        self._available = max(0, self._capacity - card.safety_margin)

    @property
    def _free(self) -> int:
        return self._capacity - sum(model.loaded for model in self._held)

    def phase(self, need: Need) -> Residency:
        """Load what `need` asks, evict as the host would, and say what the card then looks like."""
        before = {model.key: model.loaded for model in self._held}
        mine = [self._take(model) for model in need.models if model.on_card and model.resident_bytes]
        if self._rules.patchers == "dynamic":
            self._load_dynamic(mine, need)
        else:
            self._load_legacy(mine, need)
        keys = {model.key for model in mine}
        leaving = tuple(model.name for model in self._held if model.key not in keys and model.loaded < before.get(model.key, 0))
        gone = [model for model in self._held if model.loaded == 0 and model.key not in keys]
        self._held = [model for model in self._held if model not in gone]
        resident = sum(model.loaded for model in mine)
        return Residency(
            resident=resident,
            offloaded=sum(model.size for model in mine) - resident,
            others=sum(model.loaded for model in self._held if model.key not in keys),
            leaving=leaving,
            available=self._available,
            free=self._free,
        )

    def _take(self, model: ModelRef) -> _Held:
        """The model's entry, moved to the front as the newest."""
        key = model.key
        found = next((held for held in self._held if held.key == key), None)
        if found is None:
            found = _Held(key, model.file, 0, 0)
        else:
            self._held.remove(found)
        found.name, found.size = model.file, model.resident_bytes or 0
        found.loaded = min(found.loaded, found.size)
        self._held.insert(0, found)
        return found

    def _load_legacy(self, mine: list[_Held], need: Need) -> None:
        rules = self._rules
        inference = rules.minimum_inference_bytes
        wanted = max(inference, need.wanted + rules.reserve_bytes)
        minimum = max(inference, need.minimum + rules.reserve_bytes)
        missing = sum(model.size - model.loaded for model in mine)
        self._evict(round(missing * LOAD_FACTOR) + wanted, keep=mine)
        if self._free < minimum:
            self._evict(minimum, keep=mine)
        for model in mine:
            if rules.vram_state == "HIGH_VRAM":
                budget = model.size
            elif rules.vram_state == "NO_VRAM":
                budget = 0
            else:
                free = self._free + model.loaded
                floor = min(round(free * rules.minimum_weight_ratio), free - inference)
                budget = max(0, free - minimum, floor)
            # a model that is there already is never shrunk by loading it again
            model.loaded = min(model.size, max(model.loaded, budget))

    def _load_dynamic(self, mine: list[_Held], need: Need) -> None:
        """Pages of the newest models stay, those of the oldest go, down to the host's headroom."""
        room = max(0, self._capacity - need.minimum - self._rules.headroom_bytes)
        for model in self._held:
            # only a model in use grows; one that is not keeps at most what it had
            model.loaded = min(model.size if model in mine else model.loaded, room)
            room -= model.loaded

    def _evict(self, wanted: int, keep: list[_Held]) -> None:
        """Most offloaded first, then smallest; a model whose part suffices leaves in part (ComfyUI free_memory)."""
        leaving = [model for model in self._held if model not in keep]
        for model in sorted(leaving, key=lambda model: (model.loaded - model.size, model.size)):
            missing = wanted - self._free
            if missing <= 0:
                return
            model.loaded = max(0, model.loaded - missing)


def match_held(models: Iterable[ModelRef], held: Iterable[HeldModel]) -> dict[tuple[str, str, str], HeldModel]:
    """Which loaded model is which of the graph's, by key: the same file, and of several parts of it the nearest in size."""
    left = [model for model in held if model.file]
    found: dict[tuple[str, str, str], HeldModel] = {}
    for model in models:
        size = model.resident_bytes or 0
        same = [other for other in left if other.file == model.path and size / 1.25 <= other.bytes <= size * 1.25]
        if same:
            nearest = min(same, key=lambda other: abs(other.bytes - size))
            found[model.key] = nearest
            left.remove(nearest)
    return found
