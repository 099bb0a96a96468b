"""A model's patcher on the simulated card: its weights are the layers of the file it stands for, booked one by one."""

from __future__ import annotations

import copy
import logging
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
from comfy_aimdo.model_vbar import ModelVBAR, vbars_analyze
from standin.card import CPU, memory, on_card
from standin.models import StandInModel
from standin.streaming import Staged

from . import memory_management, model_management
from .patcher_extension import CallbacksMP, Registry, copy_nested_dicts


class ModelPatcher:
    """ComfyUI's handle of a model; clones share the model and its place on the card."""

    def __init__(
        self,
        model: StandInModel,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        self.size = size
        self.model = model
        self.load_device = load_device
        self.offload_device = offload_device
        self.weight_inplace_update = weight_inplace_update
        self.patches: dict[str, list[Any]] = {}
        self.patches_uuid = uuid.uuid4()
        self.object_patches: dict[str, Any] = {}
        self.hook_patches: dict[Any, Any] = {}
        self.injections: dict[str, list[Any]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.parent: ModelPatcher | None = None
        self.attachments: dict[str, Any] = {}
        self.additional_models: dict[str, list[ModelPatcher]] = {}
        self.callbacks: Registry = {}
        self.wrappers: Registry = {}
        self.is_clip = False
        self.cached_patcher_init: tuple[Any, ...] | None = None
        self.clone_base_uuid = uuid.uuid4()
        if model.device is None:
            model.device = offload_device

    def is_dynamic(self) -> bool:
        return False

    def model_size(self) -> int:
        if self.size <= 0:
            self.size = self.model.file.tensor_bytes
        return self.size

    def loaded_size(self) -> int:
        return self.model.model_loaded_weight_memory

    def lowvram_patch_counter(self) -> int:
        return 0

    def get_free_memory(self, device: torch.device) -> int:
        """Pages count as free here: they leave for whatever needs the room."""
        pages = vbars_analyze() if memory_management.aimdo_enabled else 0
        return model_management.get_free_memory(device) + pages

    def memory_required(self, input_shape: Any) -> float:
        return self.model.memory_required(input_shape=input_shape)

    def model_dtype(self) -> torch.dtype:
        return self.model.dtype

    def current_loaded_device(self) -> torch.device | None:
        return self.model.device

    def model_patches_to(self, device: Any) -> None: ...

    def model_patches_models(self) -> list[Any]:
        return []

    def get_model_object(self, name: str) -> Any:
        if name in self.object_patches:
            return self.object_patches[name]
        found: Any = self.model
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        self.patches_uuid = uuid.uuid4()
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength_patch, patch, strength_model))
        return list(patches)

    def clone(self, disable_dynamic: bool = False, model_override: Any = None, force_deepcopy: bool = False) -> ModelPatcher:
        model: StandInModel = self.model if model_override is None else model_override[0]
        kind = self.__class__
        if self.is_dynamic() and disable_dynamic:
            kind = ModelPatcher
            if model_override is None:
                if self.cached_patcher_init is None:
                    raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init is not initialized.")
                load, arguments = self.cached_patcher_init[:2]
                model = load(*arguments, disable_dynamic=True).model
        other = kind(model, self.load_device, self.offload_device, self.model_size(), self.weight_inplace_update)
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        other.patches_uuid = self.patches_uuid
        other.object_patches = dict(self.object_patches)
        other.model_options = copy_nested_dicts(self.model_options)
        other.parent = self
        for key, attachment in self.attachments.items():
            on_clone = getattr(attachment, "on_model_patcher_clone", None)
            other.attachments[key] = on_clone() if on_clone else attachment
        other.additional_models = {key: [one.clone() for one in group] for key, group in self.additional_models.items()}
        other.callbacks = copy_nested_dicts(self.callbacks)
        other.wrappers = copy_nested_dicts(self.wrappers)
        other.is_clip = self.is_clip
        other.cached_patcher_init = copy.copy(self.cached_patcher_init)
        other.clone_base_uuid = self.clone_base_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_CLONE):
            callback(self, other)
        return other

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "model", None) is self.model

    # Weights: what is on the card is a prefix of `file.layers`, which are ordered from the largest to the smallest.

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> float:
        """Put up to `extra_memory` more bytes on the device; a negative amount takes some away."""
        model = self.model
        repatch = model.current_weight_patches_uuid not in (None, self.patches_uuid) or (
            force_patch_weights and model.current_weight_patches_uuid is not None
        )
        used = self.loaded_size()
        if repatch:
            self._place(0, self.offload_device)
            extra_memory += used
        if extra_memory < 0 and not repatch:
            self.partially_unload(self.offload_device, -extra_memory)
            return 0
        before = self.loaded_size()
        if before == self.model_size():
            return 0
        try:
            self.load(device_to, lowvram_model_memory=before + extra_memory, force_patch_weights=force_patch_weights)
        except Exception:
            self.detach()
            raise
        return self.loaded_size() - before

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        device = device_to or self.load_device
        full_load = full_load or lowvram_model_memory > self.model_size()
        layers = self.model.file.layers
        wanted = buffer = 0
        for index, size in enumerate(layers):
            # Room for the largest layer that streams and those fetched ahead of it (0.33, ModelPatcher.load).
            ahead = max(buffer, size + sum(layers[index + 1 : index + 1 + model_management.NUM_STREAMS]))
            if full_load or wanted + size + ahead < lowvram_model_memory:
                wanted += size
            else:
                buffer = ahead
        self._place(wanted, device)
        self.model.current_weight_patches_uuid = self.patches_uuid
        offloaded = self.model_size() - wanted
        logging.info(
            "loaded %s; %.2f MB loaded, %.2f MB offloaded",
            "partially" if offloaded else "completely",
            wanted / 2**20,
            offloaded / 2**20,
        )
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device, lowvram_model_memory, force_patch_weights, full_load)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        freed = 0
        for size in reversed(self.model.file.layers):
            if freed >= memory_to_free or freed >= self.loaded_size():
                break
            freed += size
        freed = min(freed, self.loaded_size())
        self._place(self.loaded_size() - freed, self.model.device or self.load_device)
        return freed

    def detach(self, unpatch_all: bool = True) -> StandInModel:
        if unpatch_all:
            self._place(0, self.offload_device)
            self.model.current_weight_patches_uuid = None
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    def _place(self, nbytes: int, device: torch.device, what: str = "weights") -> None:
        """Hold `nbytes` of the weights on `device`, and say so in the card's books."""
        model, the_card = self.model, memory()
        if the_card is not None:
            if on_card(device) and model.booking is None and nbytes > 0:
                model.booking = the_card.allocate(nbytes, f"{model.__class__.__name__} {what} ({model.file.name})")
                model.finalizer = weakref.finalize(model, the_card.release, model.booking)
            elif model.booking is not None and on_card(device) and nbytes > 0:
                the_card.resize(model.booking, nbytes)
            elif model.booking is not None:
                model.forget_booking(the_card)
        model.device = device
        model.model_loaded_weight_memory = nbytes

    # Callbacks and wrappers.

    def add_callback(self, call_type: str, callback: Callable[..., Any]) -> None:
        self.add_callback_with_key(call_type, None, callback)

    def add_callback_with_key(self, call_type: str, key: str | None, callback: Callable[..., Any]) -> None:
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, call_type: str, key: str | None) -> None:
        self.callbacks.get(call_type, {}).pop(key, None)

    def get_all_callbacks(self, call_type: str) -> list[Callable[..., Any]]:
        return [one for group in self.callbacks.get(call_type, {}).values() for one in group]

    def add_wrapper(self, wrapper_type: str, wrapper: Callable[..., Any]) -> None:
        self.add_wrapper_with_key(wrapper_type, None, wrapper)

    def add_wrapper_with_key(self, wrapper_type: str, key: str | None, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str | None) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def get_all_wrappers(self, wrapper_type: str) -> list[Callable[..., Any]]:
        return [one for group in self.wrappers.get(wrapper_type, {}).values() for one in group]

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def get_nested_additional_models(self) -> list[ModelPatcher]:
        return [one for group in self.additional_models.values() for one in group]

    def pre_run(self) -> None:
        self.model.current_patcher = self
        for callback in self.get_all_callbacks(CallbacksMP.ON_PRE_RUN):
            callback(self)

    def prepare_state(self, timestep: torch.Tensor, model_options: dict[str, Any]) -> None:
        for callback in self.get_all_callbacks(CallbacksMP.ON_PREPARE_STATE):
            callback(self, timestep, model_options)

    def cleanup(self) -> None:
        self.model.current_patcher = None
        for callback in self.get_all_callbacks(CallbacksMP.ON_CLEANUP):
            callback(self)


PIN_SUBSETS = ["weights-loaded", "patches-loaded", "weights", "patches"]


class ModelPatcherDynamic(ModelPatcher):
    """ComfyUI's handle of a model in comfy-aimdo's pages (0.33, model_patcher.py:1749): a load only stages it and makes it the
    most important one; its forwards bring the layers (standin/streaming.py)."""

    def __new__(cls, model: Any = None, load_device: Any = None, *args: Any, **kwargs: Any) -> Any:
        if load_device is not None and model_management.is_device_cpu(load_device):
            return ModelPatcher(model, load_device, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: StandInModel,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        if not hasattr(model, "dynamic_vbars"):
            model.dynamic_vbars, model.dynamic_pins, model.dynamic_patchers = {}, {}, set()
        self.register_load_device(load_device)
        model.dynamic_patchers.add(id(self))

    def __del__(self) -> None:
        patchers = getattr(getattr(self, "model", None), "dynamic_patchers", set())
        if id(self) in patchers:
            patchers.discard(id(self))
            if not patchers:
                self.unpin_all_weights()
            self.detach(unpatch_all=False)

    def register_load_device(self, device: torch.device) -> None:
        self.model.dynamic_pins.setdefault(device, {"failed": False, "active": False, "current_prompt": False})

    def is_dynamic(self) -> bool:
        return True

    def set_in_use_by_current_prompt(self, in_use: bool) -> None:
        self.model.dynamic_pins[self.load_device]["current_prompt"] = in_use

    def _vbar_get(self, create: bool = False) -> ModelVBAR | None:
        """Ten times the model's size in addresses, of which comfy-aimdo gives no more than the card has (:1805)."""
        vbars = self.model.dynamic_vbars
        if create and self.load_device not in vbars and self.load_device != CPU:
            vbar = ModelVBAR(self.model_size() * 10, self.load_device.index)
            vbar._vbar.label = f"{self.model.__class__.__name__} weights ({self.model.file.name})"
            vbars[self.load_device] = vbar
        return vbars.get(self.load_device)

    def loaded_size(self) -> int:
        """Whole resident pages and the small weights beside them (:1809)."""
        vbar = self._vbar_get()
        return (0 if vbar is None else vbar.loaded_size()) + self.model.model_loaded_weight_memory

    def loaded_ram_size(self) -> int:
        return 0 if self.model.staged is None else self.model.staged.ram_bytes

    def pinned_memory_size(self) -> int:
        return self.loaded_ram_size()

    def memory_required(self, input_shape: Any) -> float:
        return super().memory_required(input_shape=input_shape) * 1.3 + 2**30

    def pin_weight_to_device(self, key: str) -> None:
        raise RuntimeError("pin_weight_to_device: a dynamic model's weights are pinned when they are used")

    def unpin_weight(self, key: str) -> None:
        raise RuntimeError("unpin_weight: a dynamic model's weights are pinned when they are used")

    def unpin_all_weights(self) -> None:
        self.partially_unload_ram(1e32)

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        dirty: bool = False,
    ) -> None:
        """Nothing comes onto the card but the small weights; budgets are ignored (:1853-2035)."""
        assert not force_patch_weights
        assert not full_load
        assert device_to == self.load_device
        self.restore_loaded_backups()
        vbar = self._vbar_get(create=True)
        assert vbar is not None
        self.model.dynamic_pins[self.load_device].update(failed=False, active=True)
        vbar.prioritize()
        if self.model.staged is None:
            self.model.staged = Staged(self.model, vbar)
        if dirty:
            self.model.staged.forget_contents()
        self._place(self.model.staged.forced_bytes, self.load_device, "small weights")
        logging.info(
            "Model %s prepared for dynamic VRAM loading. %dMB Staged. %d patches attached. Force pre-loaded weights: %d KB.",
            self.model.__class__.__name__,
            self.model.staged.nbytes // 2**20,
            len(self.patches),
            self.model.staged.forced_bytes // 1024,
        )
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def restore_loaded_backups(self) -> int:
        restored = self.model.model_loaded_weight_memory
        self._place(0, self.model.device or self.load_device, "small weights")
        return restored

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        """None, where a legacy patcher tells how much came (:2141)."""
        assert not force_patch_weights
        dirty = self.model.current_weight_patches_uuid not in (None, self.patches_uuid)
        self.unpatch_model(self.offload_device, unpatch_weights=False)
        try:
            self.load(device_to, dirty=dirty)
        except Exception:
            self.detach()
            raise

    def partially_unload(
        self, device_to: torch.device | None, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Pages from the top, then the small weights; copies in RAM stay (:2037)."""
        assert not force_patch_weights
        vbar = self._vbar_get()
        freed = 0 if vbar is None else vbar.free_memory(memory_to_free)
        return freed + (self.restore_loaded_backups() if freed < memory_to_free else 0)

    def partially_unload_ram(self, ram_to_unload: float, subsets: list[str] = PIN_SUBSETS) -> int:
        """Copies in pinned RAM; the next load of these layers reads the file again (:2099)."""
        return 0 if self.model.staged is None else self.model.staged.drop_copies(ram_to_unload, subsets)

    def patch_model(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> StandInModel:
        assert not load_weights
        return self.model

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """With the weights: copies in RAM and pages both (:2132)."""
        if unpatch_weights:
            self.partially_unload_ram(1e32)
            self.partially_unload(None, 1e32)

    def detach(self, unpatch_all: bool = True) -> StandInModel:
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=True)
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    def get_non_dynamic_delegate(self) -> ModelPatcher:
        return self.clone(disable_dynamic=True)


CoreModelPatcher = ModelPatcher
