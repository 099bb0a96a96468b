"""Replays the host's own load and evict rules over a chain: what is on the card in each phase, what leaves, what streams.

Legacy rules are ComfyUI's load_models_gpu and free_memory (comfy/model_management.py, 0.8 and 0.33). Where their order hangs
on Python's reference counts, or in 0.8 on the order of a set, every order is replayed, and the one that leaves least free is
shown. Dynamic rules are comfy-aimdo's: weights take what activations leave free, in pages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby, islice, permutations
from typing import Final, NamedTuple

from ..units import MIB
from .modules import Module
from .placing import EVERYTHING, Key, Placed, emptied, loaded_more, unloaded, with_modules
from .types import Card, HeldModel, HostRules, ModelRef

LOAD_FACTOR: Final = 1.1
"""ComfyUI frees 1.1 times the weights it is about to load (load_models_gpu)."""

PAGE: Final = 32 * MIB
"""comfy-aimdo places the weights of a dynamic model in pages of this size (model-vbar.c, 0.4.13)."""

NO_WEIGHTS: Final = 0.1
"""The budget, in bytes, that ComfyUI gives weights where it wants none on the card: 0 means no limit (load_models_gpu)."""

MOST_ORDERS: Final = 24
"""Orders tried at one point, and outcomes carried on: four models of one rank in every order. Of more, the worst are kept."""

BUDGETED: Final = ("NORMAL_VRAM", "LOW_VRAM")
"""States in which weights get what is free; in the others all of a model is placed, or with NO_VRAM none (load_models_gpu)."""


class Weights(NamedTuple):
    """How one model is loaded in one phase, beyond its size."""

    modules: tuple[Module, ...] = ()
    """In ComfyUI's load order (modules.load_order); without them weights are taken to be divisible at will."""
    patches: str = ""
    """Names the LoRA loaders it came through, if any: ComfyUI takes all weights off the card to exchange what they patch."""
    elastic: bool | None = None
    """Whether its pages come and go with use; None: as the host's patchers are. Packs with their own patcher (GGUF) differ."""


class Need(NamedTuple):
    """What one phase asks of the card, in bytes."""

    models: tuple[ModelRef, ...]
    minimum: int
    """Activations of the smallest forward: what weights must leave free."""
    wanted: int
    """Activations ComfyUI would like room for: what others are evicted for."""
    weights: Mapping[Key, Weights] = {}
    full_load: bool = False
    """All weights are placed whatever is free (force_full_load: a text encoder that starts on the card, some VAEs)."""
    lower: int | None = None
    """Bounds of what activations really take, where they differ from `minimum`: elastic weights get the rest."""
    upper: int | None = None


Outcome = tuple[tuple[Key, int], ...]
"""Bytes on the card by model, as the host reports them, newest first; a model that is not in it has none."""


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
    after: Outcome = ()
    outcomes: tuple[Outcome, ...] = ()
    """All that may come of it, in every order models may leave in; `after` is the worst."""
    lower: int = 0
    """Bounds of `resident`: over all outcomes, and a page either way for elastic weights."""
    upper: int = 0
    buffer: int = 0
    """What weights that stream take on the card beside the resident ones: the module in use and those fetched ahead."""


_World = tuple[Placed, ...]
"""The card in one order of events: its models, newest first."""


class Replay:
    """The card through a run. Feed it the phases in order."""

    def __init__(
        self,
        card: Card,
        rules: HostRules,
        held: Iterable[HeldModel] = (),
        models: Iterable[ModelRef] = (),
        pinned: Collection[Key] = (),
    ) -> None:
        """`pinned` are models that a policy keeps on the card from their first load on; those there already say so."""
        self._rules = rules
        self._pinned = frozenset(pinned)
        held = [model for model in held if model.bytes_on_card > 0]
        known = {id(found): key for key, found in match_held(models, held).items()}
        world = tuple(self._found(known.get(id(model), (f"held {index}", "", "")), model) for index, model in enumerate(held))
        loaded = sum(model.loaded for model in world)
        self._capacity = max(0, min(card.free + loaded, card.total))
        """What weights and activations share: all but other programs and the context."""
        # the host knows nothing of our margin and places weights in it; only what we promise leaves it out
        self._available = max(0, self._capacity - card.safety_margin)
        self._worlds: tuple[_World, ...] = (world,)

    @property
    def free(self) -> int:
        """What the host sees free now, in the worst order of events."""
        return self._free(self._worlds[0])

    @property
    def loaded(self) -> dict[Key, int]:
        """Bytes on the card now by model, in the worst order of events."""
        return dict(_outcome(self._worlds[0]))

    def phase(self, need: Need) -> Residency:
        """Load what `need` asks, evict as the host would, and say what the card then looks like."""
        before = self._worlds[0]
        asked = {model.key: model for model in need.models if model.on_card and model.resident_bytes}
        if asked:
            after = dict.fromkeys(
                placed for world in self._worlds for placed in self._load(self._ready(world, asked, need), tuple(asked), need)
            )

            def room(world: _World) -> tuple[int, int]:
                return self._free(world), sum(model.on_card for model in world if model.key in asked)

            self._worlds = tuple(islice(sorted(after, key=room), MOST_ORDERS))
        return self._seen(before, asked, need)

    def leave(self, keys: Collection[Key]) -> None:
        """A policy sends these models off the card, as between prompts; one that has nowhere to go stays."""
        self._worlds = tuple(
            dict.fromkeys(
                _kept(replace(emptied(model), listed=False) if model.key in keys else model for model in world)
                for world in self._worlds
            )
        )

    def empty(self) -> None:
        """Every model leaves, as when a pack asks ComfyUI to unload them all; what has no place but the card stays."""
        self._worlds = tuple(
            dict.fromkeys(_kept(replace(emptied(model), listed=False) for model in world) for world in self._worlds)
        )

    def forget(self, keys: Collection[Key]) -> None:
        """These models are no more: what loaded them left the graph or the cache."""
        self._worlds = tuple(dict.fromkeys(_kept(model for model in world if model.key not in keys) for world in self._worlds))

    # a world and what it says

    def _found(self, key: Key, model: HeldModel) -> Placed:
        size, loaded = model.bytes, model.bytes_on_card
        pinned = model.pinned or key in self._pinned
        partly, stays = loaded < size, self._has_no_place_but_the_card(key)
        return Placed(key, model.name, size, loaded, partly=partly, elastic=model.elastic, pinned=pinned, stays=stays)

    def _has_no_place_but_the_card(self, key: Key) -> bool:
        """unet_offload_device with --highvram; all models with --gpu-only."""
        return self._rules.gpu_only or (self._rules.vram_state == "HIGH_VRAM" and key[1] == "generator")

    def _free(self, world: _World) -> int:
        if self._rules.free_from_list:
            return max(0, self._capacity - sum(model.loaded for model in world if model.listed))
        return max(0, self._capacity - sum(model.on_card for model in world))

    def _ready(self, world: _World, asked: Mapping[Key, ModelRef], need: Need) -> _World:
        """The world with an entry, off the list, for every model asked for."""
        there = {model.key: model for model in world}
        mine: list[Placed] = []
        for key, ref in asked.items():
            size = ref.resident_bytes or 0
            model = there.get(key)
            if model is None:
                stays = self._has_no_place_but_the_card(key)
                model = Placed(key, ref.file, size, pinned=key in self._pinned, stays=stays)
            weights = need.weights.get(key, Weights())
            elastic = self._rules.patchers == "dynamic" if weights.elastic is None else weights.elastic
            loaded = min(model.loaded, size)
            # without a size of its own the model was taken to be whole, or not, by what the host said
            partly = model.partly if model.size == size else loaded < size
            model = replace(
                model, name=ref.file, size=size, loaded=loaded, partly=partly and bool(loaded), elastic=elastic, listed=False
            )
            if weights.modules:
                model = with_modules(model, weights.modules)
            mine.append(model)
        return (*mine, *(model for model in world if model.key not in asked))

    def _seen(self, before: _World, asked: Mapping[Key, ModelRef], need: Need) -> Residency:
        world = self._worlds[0]
        own = [model for model in world if model.key in asked]
        others = [model for model in world if model.key not in asked]
        now = {model.key: model.on_card for model in world}
        resident = sum(model.on_card for model in own)
        bound = sum(model.on_card for model in others if model.stays or (model.pinned and not model.elastic))
        if need.full_load or not (self._rules.vram_state in (*BUDGETED, "NO_VRAM") or self._rules.patchers == "dynamic"):
            bound += resident
        lower, upper = self._bounds(asked, need)
        return Residency(
            resident=resident,
            offloaded=sum(model.size for model in own) - resident,
            others=sum(model.on_card for model in others),
            leaving=tuple(m.name for m in before if m.key not in asked and now.get(m.key, 0) < m.on_card),
            available=max(0, self._available - bound),
            free=self._free(world),
            after=_outcome(world),
            outcomes=tuple(dict.fromkeys(_outcome(world) for world in self._worlds)),
            lower=lower,
            upper=upper,
            buffer=round(sum(model.buffer for model in own)),
        )

    def _bounds(self, asked: Mapping[Key, ModelRef], need: Need) -> tuple[int, int]:
        """Least and most of this phase's weights on the card, over all worlds."""
        low: list[int] = []
        high: list[int] = []
        for world in self._worlds:
            own = [model for model in world if model.key in asked]
            fixed = sum(model.on_card for model in own if not model.elastic)
            flexible = sum(model.size for model in own if model.elastic)
            pages = PAGE * sum(model.elastic for model in own)
            rest = self._capacity - sum(model.on_card for model in world if not model.elastic) - self._rules.headroom_bytes
            most = rest - (need.minimum if need.lower is None else need.lower) + pages
            least = rest - (need.minimum if need.upper is None else need.upper) - pages
            low.append(fixed + max(0, min(flexible, least)))
            high.append(fixed + max(0, min(flexible, most)))
        return min(low, default=0), max(high, default=0)

    # loading: comfy.model_management.load_models_gpu

    def _load(self, world: _World, mine: tuple[Key, ...], need: Need) -> Iterator[_World]:
        rules = self._rules
        wanted = max(rules.minimum_inference_bytes, need.wanted + rules.reserve_bytes)
        minimum = max(rules.minimum_inference_bytes, need.minimum + rules.reserve_bytes)
        own = [model for model in world if model.key in mine]
        missing = sum(model.size - model.loaded for model in own)
        between_elastic = all(model.elastic for model in own)
        for made in self._evict(world, missing * LOAD_FACTOR + wanted, mine, between_elastic):
            for placed in self._evict(made, minimum, mine, between_elastic) if self._free(made) < minimum else (made,):
                for order in self._load_orders(mine):
                    loaded = placed
                    for key in order:
                        loaded = self._place(loaded, key, minimum, need)
                    yield _kept(self._fault_in(loaded, mine, need))

    def _load_orders(self, mine: tuple[Key, ...]) -> Iterable[tuple[Key, ...]]:
        if self._rules.keeps_load_order or len(mine) == 1:
            return (mine[::-1],)
        return islice(permutations(mine), MOST_ORDERS)

    def _place(self, world: _World, key: Key, minimum: int, need: Need) -> _World:
        """One model loaded and listed as the newest. Elastic ones only get listed: their pages come when they are used."""
        rules = self._rules
        model = next(model for model in world if model.key == key)
        if not model.elastic:
            extra: float = EVERYTHING
            if rules.vram_state == "NO_VRAM":
                extra = NO_WEIGHTS
            elif rules.vram_state in BUDGETED and not need.full_load:
                free = self._free(world) + model.loaded
                floor = min(free * rules.minimum_weight_ratio, free - rules.minimum_inference_bytes)
                extra = max(0, free - minimum, floor) - model.loaded or NO_WEIGHTS
            patches = need.weights.get(key, Weights()).patches
            model = loaded_more(model, extra, patches, rules.offload_streams)
        return (replace(model, listed=True), *(other for other in world if other.key != key))

    def _fault_in(self, world: _World, mine: tuple[Key, ...], need: Need) -> _World:
        """Pages of the newest elastic models stay, those of the oldest go, down to the host's headroom."""
        if not any(model.elastic for model in world):
            return world
        fixed = sum(model.on_card for model in world if not model.elastic)
        room = max(0, self._capacity - fixed - need.minimum - self._rules.headroom_bytes)
        placed: list[Placed] = []
        for model in world:
            if model.elastic:
                # only a model in use grows; one that is not keeps at most what it had
                loaded = min(model.size if model.key in mine else model.loaded, room)
                room -= loaded
                model = replace(model, loaded=loaded)
            placed.append(model)
        return tuple(placed)

    # evicting: comfy.model_management.free_memory

    def _evict(self, world: _World, wanted: float, mine: tuple[Key, ...], between_elastic: bool) -> tuple[_World, ...]:
        """Most offloaded first, then least referenced, then smallest.

        How often a model is referenced nobody can say beforehand: those offloaded alike leave in every order there is.
        """
        if self._rules.smart_memory and wanted <= self._free(world) and not any(model.elastic for model in world):
            return (world,)
        victims = [
            model for model in world if model.listed and model.key not in mine and not (model.pinned and not model.elastic)
        ]
        victims.sort(key=lambda model: (model.loaded - model.size, model.size))
        states: dict[tuple[_World, float], None] = {(world, wanted): None}
        for _, group in groupby(victims, key=lambda model: model.loaded - model.size):
            orders = tuple(islice(permutations([model.key for model in group]), MOST_ORDERS))
            states = dict.fromkeys(
                self._evict_in_order(state, left, order, between_elastic) for state, left in states for order in orders
            )
            if len(states) > MOST_ORDERS:
                states = dict.fromkeys(sorted(states, key=lambda state: self._free(state[0]))[:MOST_ORDERS])
        return tuple(dict.fromkeys(state for state, _ in states))

    def _evict_in_order(
        self, world: _World, wanted: float, order: tuple[Key, ...], between_elastic: bool
    ) -> tuple[_World, float]:
        for key in order:
            index = next(index for index, model in enumerate(world) if model.key == key)
            model = world[index]
            missing = wanted - self._free(world) if self._rules.smart_memory else EVERYTHING
            if self._rules.smart_memory and model.elastic and between_elastic:
                # elastic models make room for each other by themselves
                wanted -= model.loaded
                continue
            if missing > 0:
                world = (*world[:index], unloaded(model, missing, self._rules.offload_streams), *world[index + 1 :])
        return world, wanted


def _kept(models: Iterable[Placed]) -> _World:
    """Models the host lists or that are on the card."""
    return tuple(model for model in models if model.listed or model.on_card)


def _outcome(world: _World) -> Outcome:
    return tuple((model.key, model.loaded) for model in world if model.loaded)


def match_held(models: Iterable[ModelRef], held: Iterable[HeldModel]) -> dict[Key, HeldModel]:
    """Which loaded model is which of the graph's, by key: the same file, and of several parts of it the nearest in size."""
    left = [model for model in held if model.file]
    found: dict[Key, HeldModel] = {}
    for model in models:
        size = model.resident_bytes or 0
        same = [other for other in left if other.file == model.path and size / 1.25 <= other.bytes <= size * 1.25]
        if same:
            nearest = min(same, key=lambda other: abs(other.bytes - size))
            found[model.key] = nearest
            left.remove(nearest)
    return found


def starts_on_card(size: int, free: int, ram_free: int, rules: HostRules) -> bool:
    """Whether a text encoder is loaded as soon as its loader runs, wholly (text_encoder_initial_device): ask with `full_load`.

    Only above 1 GiB, and where the card has room for 1.2 times its weights and more room than half the free system memory.
    """
    if rules.patchers == "dynamic" or rules.gpu_only or not rules.text_encoder_on_card or size <= 1 << 30:
        return False
    return free > ram_free * 0.5 and size * 1.2 < free
