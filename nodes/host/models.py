"""ComfyUI's models: handles on them, what is loaded, the rules it loads by, the types of its nodes, its cards."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import comfy.model_management as model_management
import comfyui_version
import nodes as comfy_nodes
import torch

from ...vram.device import Accelerator, CallbackAccelerator, MemoryReading, discover
from ...vram.estimate.backend import NEWEST_TRACED, Backend
from ...vram.plan.types import HeldModel, HostRules, NodeSpec
from ...vram.status import LoadedModel, Running
from .seams import LOADED_MODELS, MEMORY_READING, SOURCE_FILES, SeamTable

logger = logging.getLogger("vram_headroom")


LOADS_IN_ANY_ORDER = (0, 8, 999)
"""The last ComfyUI known to load the models of one call in the order of a Python set; 0.33 keeps the order asked for."""


class OnCard(NamedTuple):
    """A model on ComfyUI's list of loaded ones, as plain values. Bytes."""

    key: int
    """id of the inner model, which all clones share."""
    name: str
    file: str | None
    bytes: int
    bytes_on_card: int
    in_use: bool
    elastic: bool
    device_index: int


class ComfyModelHandle:
    """A model that ComfyUI places. Holds it weakly: registering never keeps a model alive."""

    def __init__(self, patcher: Any, models: HostModels) -> None:
        self._model = weakref.ref(patcher.model)
        self._key = id(patcher.model)
        self._models = models
        self._patcher = weakref.ref(patcher)
        self._device_index = device_index(patcher)
        self._bytes = int(patcher.model_size())
        self.elastic = is_dynamic(patcher)

    @property
    def key(self) -> int:
        return self._key

    @property
    def alive(self) -> bool:
        return self._model() is not None

    @property
    def in_use(self) -> bool:
        seen = self._models.find(self._key)
        return seen is not None and seen.in_use

    @property
    def device_index(self) -> int:
        seen = self._models.find(self._key)
        return seen.device_index if seen is not None else self._device_index

    def total_bytes(self) -> int:
        seen = self._models.find(self._key)
        return seen.bytes if seen is not None else self._bytes

    def bytes_on_card(self) -> int:
        seen = self._models.find(self._key)
        return seen.bytes_on_card if seen is not None else 0

    def load(self) -> int:
        """As a node that is about to use it would: ComfyUI makes room and decides how much of it comes. Worker thread only."""
        patcher = self._patcher()
        if patcher is None:
            raise RuntimeError("ComfyUI holds this model no longer; the node that loads it has to run again")
        before = self.bytes_on_card()
        model_management.load_models_gpu([patcher])
        return max(0, self.bytes_on_card() - before)

    def unload(self, nbytes: int | None = None) -> int:
        """Through ComfyUI's own record of it, so that its books stay true. Worker thread only."""
        before = self.bytes_on_card()
        for entry in list(model_management.current_loaded_models):
            if entry.model is not None and id(entry.model.model) == self._key and entry.model_unload(nbytes):
                model_management.current_loaded_models.remove(entry)
        return max(0, before - self.bytes_on_card())


class HostModels:
    """Reads ComfyUI's model management. Moves nothing.

    Legacy patchers are plain numbers and read at any time. Dynamic ones (comfy-aimdo) may only be read on the worker thread:
    for them `publish`, called there at node boundaries, takes the values that other threads then see.
    """

    def __init__(
        self, seams: SeamTable, running: Callable[[], Running | None], backend: Callable[[], Backend] = Backend
    ) -> None:
        """`backend` says what forwards run on; it is asked with the rules."""
        self._running = running
        self._backend = backend
        self._published: tuple[OnCard, ...] = ()
        self._specs: dict[str, tuple[object, NodeSpec]] = {}
        self._others_when_idle = 0
        self._files: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._seams = seams
        seams.note(LOADED_MODELS, live=isinstance(getattr(model_management, "current_loaded_models", None), list))
        seams.note(MEMORY_READING, live=callable(getattr(model_management, "get_free_memory", None)))

    # models

    def handle(self, patcher: Any, file: str | None) -> ComfyModelHandle:
        """A handle on a model that was just loaded from `file`."""
        if file is not None:
            self._files[patcher.model] = file
        return ComfyModelHandle(patcher, self)

    def loaded(self) -> tuple[OnCard, ...]:
        """What ComfyUI has loaded on its accelerator, newest first."""
        published = {model.key: model for model in self._published}
        running = self._running() is not None
        return tuple(self._read(entry, patcher, running, published) for entry, patcher in self._entries())

    def find(self, key: int) -> OnCard | None:
        return next((model for model in self.loaded() if model.key == key), None)

    def publish(self) -> None:
        """Take the values of dynamic models. Worker thread only."""
        running = self._running() is not None
        self._published = tuple(
            self._read(entry, patcher, running, None) for entry, patcher in self._entries() if is_dynamic(patcher)
        )

    def held(self, pinned: Callable[[int], bool] = lambda key: False) -> tuple[HeldModel, ...]:
        """What is loaded, as the planner wants it; `pinned` says of a model's key whether a policy keeps it on the card."""
        return tuple(HeldModel(m.file, m.name, m.bytes, m.bytes_on_card, m.elastic, pinned(m.key)) for m in self.loaded())

    def report(self, registered: Callable[[int], bool]) -> tuple[LoadedModel, ...]:
        return tuple(LoadedModel(m.name, m.bytes, m.bytes_on_card, registered(m.key), m.in_use) for m in self.loaded())

    def reclaimable(self, index: int) -> int:
        """Bytes ComfyUI would give back on this card when asked: models it does not compute with, and all elastic ones."""
        return sum(
            model.bytes_on_card
            for model in self.loaded()
            if model.device_index == index and (model.elastic or not model.in_use)
        )

    def _entries(self) -> Iterator[tuple[Any, Any]]:
        # a copy: the worker thread changes the list while others read it
        if not self._seams.live(LOADED_MODELS):
            return
        for entry in list(model_management.current_loaded_models):
            patcher = entry.model
            if patcher is not None and patcher.load_device != torch.device("cpu"):
                yield entry, patcher

    def _read(self, entry: Any, patcher: Any, running: bool, published: Mapping[int, OnCard] | None) -> OnCard:
        key = id(patcher.model)
        if published is not None and is_dynamic(patcher):
            return published.get(key) or OnCard(
                key, type(patcher.model).__name__, None, 0, 0, False, True, device_index(patcher)
            )
        return OnCard(
            key=key,
            name=type(patcher.model).__name__,
            file=self._source_file(patcher),
            bytes=int(patcher.model_size()),
            bytes_on_card=int(patcher.loaded_size()),
            in_use=running and bool(getattr(entry, "currently_used", True)),
            elastic=is_dynamic(patcher),
            device_index=device_index(patcher),
        )

    def _source_file(self, patcher: Any) -> str | None:
        if not self._seams.knows(SOURCE_FILES):
            self._seams.note(SOURCE_FILES, live=hasattr(patcher, "cached_patcher_init"))
        return self._files.get(patcher.model) or (source_file(patcher) if self._seams.live(SOURCE_FILES) else None)

    def interrupts(self) -> tuple[type[BaseException], ...]:
        """What ComfyUI raises when a person stops a prompt: an Exception in 0.8, none since."""
        return (model_management.InterruptProcessingException,)

    # cards

    def accelerators(self) -> Sequence[Accelerator]:
        """The cards torch reads itself; else the one device that only ComfyUI knows how to read; else none."""
        device = model_management.get_torch_device()
        if device == torch.device("cpu"):
            return ()
        found = [card for card in discover() if card.kind.replace("rocm", "cuda") == device.type]
        if found or not self._seams.live(MEMORY_READING):
            return found
        return (
            CallbackAccelerator(
                bare_name(str(model_management.get_torch_device_name(device))),
                lambda: self._host_reading(device),
                device.index or 0,
            ),
        )

    def _host_reading(self, device: Any) -> MemoryReading:
        free, free_in_torch = model_management.get_free_memory(device, torch_free_too=True)
        total = int(model_management.get_total_memory(device))
        free = int(free) - int(free_in_torch)
        used = total - free
        # ours is what models report; activations can be told from other programs' memory only by what those held when
        # nothing ran
        if self._running() is None:
            self._others_when_idle = max(0, used - int(free_in_torch) - sum(model.bytes_on_card for model in self.loaded()))
        ours = max(0, used - self._others_when_idle)
        return MemoryReading(total=total, free=free, reserved=ours, active=max(0, ours - int(free_in_torch)))

    # rules and types

    def rules(self) -> HostRules:
        """How this ComfyUI loads and evicts, read anew: launch options and other packs may change it while it runs."""
        device = model_management.get_torch_device()
        backend = self._backend()
        return HostRules(
            version=str(comfyui_version.__version__),
            patchers="dynamic" if dynamic_vram_is_on() else "legacy",
            vram_state=model_management.vram_state.name,
            reserve_bytes=int(model_management.extra_reserved_memory()),
            minimum_inference_bytes=int(model_management.minimum_inference_memory()),
            minimum_weight_ratio=float(getattr(model_management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)),
            offload_streams=max(0, int(getattr(model_management, "NUM_STREAMS", 2))),
            smart_memory=not bool(getattr(model_management, "DISABLE_SMART_MEMORY", False)),
            keeps_load_order=(backend.comfyui or NEWEST_TRACED) > LOADS_IN_ANY_ORDER,
            gpu_only=model_management.text_encoder_offload_device() == device,
            block_compute=block_compute(device),
            flash_attention=bool(model_management.xformers_enabled() or model_management.pytorch_attention_flash_attention()),
            fp8_compute=bool(model_management.supports_fp8_compute(device)),
            text_encoder_on_card=model_management.text_encoder_device() != torch.device("cpu"),
            compute_bytes=backend.element_bytes,
            vae_compute_bytes=backend.vae_element_bytes,
            backend=backend,
        )

    def vocabulary(self, classes: Iterable[str]) -> dict[str, NodeSpec]:
        """The types of these node classes; one that ComfyUI does not have, or that fails to say its types, is left out."""
        specs: dict[str, NodeSpec] = {}
        for name in classes:
            node = comfy_nodes.NODE_CLASS_MAPPINGS.get(name)
            if node is None:
                continue
            cached = self._specs.get(name)
            if cached is None or cached[0] is not node:
                try:
                    cached = (node, node_spec(node))
                except Exception:
                    # another pack's node: whatever it raises is its own affair, and it only stays unknown to us
                    logger.info("the types of node %s can't be read; it is planned as unknown", name, exc_info=True)
                    continue
                self._specs[name] = cached
            specs[name] = cached[1]
        return specs


def block_compute(device: Any) -> bool:
    """Whether the card multiplies nvfp4 and mxfp8 itself; releases without the question know no such formats."""
    ask = getattr(model_management, "supports_nvfp4_compute", None)
    return bool(ask(device)) if callable(ask) else False


def is_dynamic(patcher: Any) -> bool:
    """A DynamicVRAM patcher; releases before it have no such question to ask."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if callable(ask) else False


def device_index(patcher: Any) -> int:
    return getattr(patcher.load_device, "index", None) or 0


def dynamic_vram_is_on() -> bool:
    try:
        import comfy.memory_management as memory_management
    except ImportError:
        return False
    return bool(getattr(memory_management, "aimdo_enabled", False))


def bare_name(described: str) -> str:
    """The card's own name out of ComfyUI's description, `cuda:0 NAME : ALLOCATOR`."""
    found = re.fullmatch(r"\w+:\d+ (.+?) : \w+", described)
    return found.group(1) if found else described


def source_file(patcher: Any) -> str | None:
    """The file a patcher was loaded from, where ComfyUI's loader left a note of it."""
    match getattr(patcher, "cached_patcher_init", None):
        case (_, (str() as path, *_), *_):
            return path
        case (_, ([str() as path, *_], *_), *_):
            return path
    return None


def node_spec(node: Any) -> NodeSpec:
    """The types of a node class, V1 or V3, from what both declare: INPUT_TYPES, RETURN_TYPES, OUTPUT_NODE."""
    inputs: dict[str, str] = {}
    defaults: dict[str, object] = {}
    declared = node.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, entry in declared.get(group, {}).items():
            kind = entry[0] if isinstance(entry, (tuple, list)) and entry else entry
            inputs[name] = kind if isinstance(kind, str) else "COMBO"
            options = entry[1] if isinstance(entry, (tuple, list)) and len(entry) > 1 else None
            if isinstance(options, dict) and "default" in options:
                defaults[name] = options["default"]
    outputs = tuple(kind if isinstance(kind, str) else "COMBO" for kind in node.RETURN_TYPES)
    names = tuple(str(name) for name in getattr(node, "RETURN_NAMES", None) or ())
    return NodeSpec(inputs, outputs, bool(getattr(node, "OUTPUT_NODE", False)), defaults, names)
