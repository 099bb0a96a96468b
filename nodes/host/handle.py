"""A model that ComfyUI manages, as the offloader sees it: placed only through ComfyUI."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import comfy.model_management as model_management
import torch

from .pages import HostPages, is_dynamic


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
    dtype: str = ""
    """What its weights are computed in, as ComfyUI names it."""
    taken_at: float | None = None
    """When an elastic model was last looked at, in seconds of the clock; None: just now."""


class LoadedList(Protocol):
    """What a handle asks of the list of loaded models."""

    def find(self, key: int) -> OnCard | None: ...
    def publish(self) -> None: ...


class ComfyModelHandle:
    """Holds its model weakly: registering never keeps one alive. Clones share the model, so any living one serves to load it.

    A dynamic model's figures are those published at the last node boundary.
    """

    def __init__(self, patcher: Any, models: LoadedList) -> None:
        self._model = weakref.ref(patcher.model)
        self._key = id(patcher.model)
        self._models = models
        self._patchers = tuple(weakref.ref(one) for one in _with_parents(patcher))
        self._device_index = device_index(patcher)
        self._bytes = int(patcher.model_size())
        self.elastic = is_dynamic(patcher)
        self.dtype = dtype_of(patcher)
        """What its weights are computed in, on the card or off it."""

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
        return seen.bytes if seen is not None and seen.bytes else self._bytes

    def bytes_on_card(self) -> int:
        seen = self._models.find(self._key)
        return seen.bytes_on_card if seen is not None else 0

    def load(self) -> int:
        """As a node that is about to use it would: ComfyUI makes room and decides how much of it comes. Worker thread only.

        Raises RuntimeError when no node holds it any longer.
        """
        patcher = self.patcher()
        if patcher is None:
            raise RuntimeError("ComfyUI holds this model no longer; the node that loads it has to run again")
        before = int(patcher.loaded_size())
        model_management.load_models_gpu([patcher])
        self._models.publish()
        return max(0, int(patcher.loaded_size()) - before)

    def unload(self, nbytes: int | None = None) -> int:
        """Through ComfyUI's own record of it, so that its books stay true. Worker thread only.

        Of a dynamic model only the pages on the card go: its pinned copy in system memory stays, since reading the disk again
        costs more.
        """
        freed = sum(self._unload_entry(entry, nbytes) for entry in list(self._entries()))
        self._models.publish()
        return freed

    def keep_pages(self, pages: HostPages) -> bool:
        """Keep the pages of a dynamic model on the card until the running node has ended. False where that can't be done."""
        patcher = self.patcher()
        return patcher is not None and is_dynamic(patcher) and pages.keep(patcher, self.total_bytes())

    def patcher(self) -> Any:
        """A living patcher of the model: the one it was registered with, one that it is a clone of, or the clone that ComfyUI
        loaded; None if there is none."""
        known = (found for one in self._patchers if (found := one()) is not None)
        return next(known, None) or next((entry.model for entry in self._entries()), None)

    def _entries(self) -> Iterator[Any]:
        for entry in list(model_management.current_loaded_models):
            if entry.model is not None and id(entry.model.model) == self._key:
                yield entry

    def _unload_entry(self, entry: Any, nbytes: int | None) -> int:
        patcher = entry.model
        before = int(patcher.loaded_size())
        if is_dynamic(patcher):
            wanted = before if nbytes is None else min(before, nbytes)
            if wanted > 0:
                patcher.partially_unload(patcher.offload_device, wanted)
        elif entry.model_unload(nbytes):
            # by identity: two entries compare equal as soon as both have lost their patcher
            _remove(model_management.current_loaded_models, entry)
            return before
        return max(0, before - int(patcher.loaded_size()))


def _remove(entries: list[Any], wanted: Any) -> None:
    for index, entry in enumerate(entries):
        if entry is wanted:
            del entries[index]
            return


def _with_parents(patcher: Any) -> Iterator[Any]:
    """A patcher and those it was cloned from: each may outlive its clones, with the same model."""
    seen: set[int] = set()
    here = patcher
    while here is not None and id(here) not in seen and here.model is patcher.model:
        seen.add(id(here))
        yield here
        here = getattr(here, "parent", None)


def dtype_of(patcher: Any) -> str:
    """As torch names it; empty where the patcher does not tell."""
    ask = getattr(patcher, "model_dtype", None)
    found = ask() if callable(ask) else getattr(patcher.model, "dtype", None)
    return str(found).removeprefix("torch.") if isinstance(found, torch.dtype) else ""


def device_index(patcher: Any) -> int:
    return getattr(patcher.load_device, "index", None) or 0
