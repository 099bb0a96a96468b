"""ComfyUI's models: handles on them, what is loaded, the rules it loads by, the types of its nodes, its cards."""

from __future__ import annotations

import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import comfy.model_management as model_management
import comfyui_version
import nodes as comfy_nodes
import torch

from ...vram.components import ComponentRole, role_of
from ...vram.device import Accelerator, CallbackAccelerator, MemoryReading, PagedAccelerator, discover
from ...vram.estimate.backend import NEWEST_TRACED, Backend
from ...vram.plan.types import HeldModel, HostRules, NodeSpec
from ...vram.status import LoadedModel, Running
from .handle import ComfyModelHandle, OnCard, device_index, dtype_of
from .pages import HostPages, dynamic_vram_is_on, is_dynamic
from .seams import LOADED_MODELS, MEMORY_READING, SOURCE_FILES, SeamTable
from .uses import HostUses

logger = logging.getLogger("vram_headroom")


CPU = torch.device("cpu")

LOADS_IN_ANY_ORDER = (0, 8, 999)
"""The last ComfyUI known to load the models of one call in the order of a Python set; 0.33 keeps the order asked for."""


class HostModels:
    """Reads ComfyUI's model management. Moves nothing.

    Legacy patchers are plain numbers and read at any time. Dynamic ones (comfy-aimdo) may only be read on the worker thread:
    for them `publish`, called there at node boundaries, takes the values that other threads then see.
    """

    def __init__(
        self,
        seams: SeamTable,
        running: Callable[[], Running | None],
        backend: Callable[[], Backend] = Backend,
        clock: Callable[[], float] = time.monotonic,
        uses: HostUses | None = None,
    ) -> None:
        """`backend` says what forwards run on; it is asked with the rules. `clock` counts seconds. `uses` knows which models
        running nodes compute with."""
        self._uses = uses
        self._running = running
        self._backend = backend
        self._clock = clock
        self.pages = HostPages(seams)
        self.counts_pages = True
        """What cards call active includes elastic weights; torch's own figures alone do not."""
        self._published: tuple[OnCard, ...] = ()
        self._specs: dict[str, tuple[object, NodeSpec]] = {}
        self._others_when_idle = 0
        self._files: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._roles: weakref.WeakKeyDictionary[Any, ComponentRole] = weakref.WeakKeyDictionary()
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
        # of the others nothing is read: a status asks this several times for each component
        for entry, patcher in self._entries(key):
            published = {model.key: model for model in self._published if model.key == key}
            return self._read(entry, patcher, self._running() is not None, published)
        return None

    def publish(self) -> None:
        """Take the values of dynamic models. Worker thread only."""
        elastic = [(entry, patcher) for entry, patcher in self._entries() if is_dynamic(patcher)]
        if not elastic:
            self._published = ()
            return
        running = self._running() is not None
        now = self._clock()
        self._published = tuple(self._read(entry, patcher, running, None)._replace(taken_at=now) for entry, patcher in elastic)

    def held(self, pinned: Collection[object] = ()) -> tuple[HeldModel, ...]:
        """What is on the card, as the planner takes it. `pinned` are the models, by key, that no load makes leave."""
        return tuple(
            HeldModel(m.file, m.name, m.bytes, m.bytes_on_card, m.elastic, m.key in pinned and not m.elastic)
            for m in self.loaded()
        )

    def report(self, pipeline_of: Callable[[int], str | None]) -> tuple[LoadedModel, ...]:
        """All of them for a person to read, those that no loader of ours knows included."""
        roles = {id(patcher.model): self.role(patcher.model) for _, patcher in self._entries()}
        return tuple(
            self._reported(model, pipeline_of(model.key), roles.get(model.key, ComponentRole.OTHER)) for model in self.loaded()
        )

    def _reported(self, model: OnCard, pipeline: str | None, role: ComponentRole) -> LoadedModel:
        return LoadedModel(
            key=model.key,
            name=model.name,
            file=None if model.file is None else os.path.basename(model.file),
            role=role.value,
            dtype=model.dtype,
            bytes=model.bytes,
            bytes_on_card=model.bytes_on_card,
            pipeline=pipeline,
            in_use=model.in_use,
            elastic=model.elastic,
            device_index=model.device_index,
            age_seconds=0.0 if model.taken_at is None else max(0.0, self._clock() - model.taken_at),
        )

    def _role_of(self, key: int) -> ComponentRole:
        """Found once for each model, by its class and layers."""
        patcher = next((patcher for _, patcher in self._entries() if id(patcher.model) == key), None)
        return ComponentRole.OTHER if patcher is None else self.role(patcher.model)

    def role(self, model: Any) -> ComponentRole:
        """Of an inner model, loaded or not."""
        if model not in self._roles:
            self._roles[model] = role_of(type(model).__name__, model)
        return self._roles[model]

    def name_of(self, patcher: Any) -> str:
        """The file it was loaded from, where ComfyUI knows, else the name of its class."""
        file = self._source_file(patcher)
        return os.path.basename(file) if file else type(patcher.model).__name__

    def unload(self, wanted: Callable[[int, ComponentRole], bool]) -> int:
        """Send loaded models that no node computes with off the card, by key and role. Worker thread only. Returns the bytes
        freed."""
        busy = {model.key for model in self.loaded() if model.in_use}
        found = {id(patcher.model): patcher for _, patcher in self._entries()}
        leaving = [patcher for key, patcher in found.items() if key not in busy and wanted(key, self._role_of(key))]
        return sum(ComfyModelHandle(patcher, self).unload() for patcher in leaving)

    def adopt(self, key: int) -> tuple[str, ComponentRole, ComfyModelHandle] | None:
        """Name, role and a handle of a loaded model of any loader; None if none of this key is loaded. Worker thread only."""
        patcher = next((patcher for _, patcher in self._entries() if id(patcher.model) == key), None)
        if patcher is None:
            return None
        return self.name_of(patcher), self.role(patcher.model), ComfyModelHandle(patcher, self)

    def reclaimable(self, index: int, pinned: Collection[object] = ()) -> int:
        """Bytes ComfyUI would give back on this card when asked: all elastic models, and others that it does not compute with
        and nobody pinned."""
        return sum(
            model.bytes_on_card
            for model in self.loaded()
            if model.device_index == index and (model.elastic or not (model.in_use or model.key in pinned))
        )

    def _entries(self, key: int | None = None) -> Iterator[tuple[Any, Any]]:
        """Of the model of this key; None: all."""
        # a copy: the worker thread changes the list while others read it
        if not self._seams.live(LOADED_MODELS):
            return
        for entry in list(model_management.current_loaded_models):
            patcher = entry.model
            if patcher is None or (key is not None and id(patcher.model) != key):
                continue
            if patcher.load_device != CPU:
                yield entry, patcher

    def _read(self, entry: Any, patcher: Any, running: bool, published: Mapping[int, OnCard] | None) -> OnCard:
        key = id(patcher.model)
        if published is not None and is_dynamic(patcher):
            nothing = OnCard(key, type(patcher.model).__name__, None, 0, 0, False, True, device_index(patcher))
            # who computes with it is known at any time; only its pages are not
            return published.get(key, nothing)._replace(in_use=running and self._in_use(key, entry))
        return OnCard(
            key=key,
            name=type(patcher.model).__name__,
            file=self._source_file(patcher),
            bytes=int(patcher.model_size()),
            bytes_on_card=int(patcher.loaded_size()),
            in_use=running and self._in_use(key, entry),
            elastic=is_dynamic(patcher),
            device_index=device_index(patcher),
            dtype=dtype_of(patcher),
        )

    def _in_use(self, key: int, entry: Any) -> bool:
        if self._uses is not None and self._uses.known:
            return key in self._uses.now()
        return bool(getattr(entry, "currently_used", True))

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
        if len(found) == 1 and self.pages.used_by_process() is not None:
            # torch counts neither pages nor buffers; on several cards their total can't be shared out
            return [PagedAccelerator(found[0], self.pages.used_by_process, self._pages_on)]
        if found or not self._seams.live(MEMORY_READING):
            self.counts_pages = False
            return found
        return (
            CallbackAccelerator(
                bare_name(str(model_management.get_torch_device_name(device))),
                lambda: self._host_reading(device),
                device.index or 0,
            ),
        )

    def _pages_on(self, index: int) -> int:
        """Bytes of elastic weights on a card at the last node boundary."""
        return sum(model.bytes_on_card for model in self._published if model.device_index == index)

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
            headroom_bytes=self.pages.headroom(),
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
