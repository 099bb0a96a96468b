"""ComfyUI's legacy model management on the simulated card: the same budget, eviction and partial-load rules, own code.

Every name, signature and constant is that of ComfyUI 0.33; what a GPU would do with memory is done to the card's books.
"""

import gc
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from comfy_aimdo.vram_buffer import VRAMBuffer
from standin.card import CARD_DEVICE, CPU, GIB, card, on_card
from standin.holds import holds
from standin.journal import journal

from . import memory_management

if TYPE_CHECKING:
    from .model_patcher import ModelPatcher

MIB = 2**20

# The RAM this stand-in says it has: fixed, so that decisions that look at it are the same everywhere.
RAM_BYTES = 64 * GIB


class VRAMState(Enum):
    DISABLED = 0
    NO_VRAM = 1
    LOW_VRAM = 2
    NORMAL_VRAM = 3
    HIGH_VRAM = 4
    SHARED = 5


class CPUState(Enum):
    GPU = 0
    CPU = 1
    MPS = 2


class InterruptProcessingException(BaseException):
    pass


OOM_EXCEPTION = torch.OutOfMemoryError
DISABLE_SMART_MEMORY = False
NUM_STREAMS = 2
lowvram_available = True
cpu_state = CPUState.CPU if card() is None else CPUState.GPU
vram_state = VRAMState.DISABLED if card() is None else VRAMState.NORMAL_VRAM
total_vram = (RAM_BYTES if (_the_card := card()) is None else _the_card.total_bytes) / MIB
total_ram = RAM_BYTES / MIB
torch_version = torch.__version__
# NVIDIA's ratio: weights may be offloaded entirely. The stand-in plays an NVIDIA card.
MIN_WEIGHT_MEMORY_RATIO = 0.0 if card() is not None else 0.4
EXTRA_RESERVED_VRAM = (600 if os.name == "nt" else 400) * MIB


def is_oom(e: BaseException) -> bool:
    return isinstance(e, OOM_EXCEPTION)


def raise_non_oom(e: BaseException) -> None:
    if not is_oom(e):
        raise e


# What kind of machine this is.


def get_torch_device() -> torch.device:
    return CPU if cpu_state is CPUState.CPU else CARD_DEVICE


def get_all_torch_devices(exclude_current: bool = False) -> list[torch.device]:
    return [] if exclude_current else [get_torch_device()]


def get_torch_device_name(device: torch.device) -> str:
    the_card = card()
    if the_card is not None and on_card(device):
        return f"{device} {the_card.name} : simulated"
    return device.type


def is_nvidia() -> bool:
    return cpu_state is CPUState.GPU


def is_amd() -> bool:
    return False


def is_intel_xpu() -> bool:
    return False


def cpu_mode() -> bool:
    return cpu_state is CPUState.CPU


def mps_mode() -> bool:
    return cpu_state is CPUState.MPS


def is_device_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and not on_card(device)


def is_device_mps(device: torch.device) -> bool:
    return device.type == "mps"


def is_device_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


@contextmanager
def cuda_device_context(device: torch.device) -> Iterator[None]:
    yield


def get_total_memory(dev: torch.device | None = None, torch_total_too: bool = False) -> Any:
    dev = get_torch_device() if dev is None else dev
    the_card = card()
    if the_card is not None and on_card(dev):
        total, reserved = the_card.total_bytes, the_card.read().reserved
    else:
        total = reserved = RAM_BYTES
    return (total, reserved) if torch_total_too else total


def get_free_memory(dev: torch.device | None = None, torch_free_too: bool = False) -> Any:
    dev = get_torch_device() if dev is None else dev
    the_card = card()
    if the_card is not None and on_card(dev):
        free, cached = the_card.free_bytes, 0  # the simulated card has no allocator that keeps freed blocks
    else:
        free = cached = RAM_BYTES
    return (free, cached) if torch_free_too else free


# What such a machine can compute with.


def xformers_enabled() -> bool:
    return False


def pytorch_attention_enabled() -> bool:
    return cpu_state is CPUState.GPU


def pytorch_attention_flash_attention() -> bool:
    return cpu_state is CPUState.GPU


def sage_attention_enabled() -> bool:
    return False


def flash_attention_enabled() -> bool:
    return False


def comfy_kitchen_attention_enabled() -> bool:
    return False


def should_use_fp16(
    device: torch.device | None = None,
    model_params: float = 0,
    prioritize_performance: bool = True,
    manual_cast: bool = False,
) -> bool:
    return cpu_state is CPUState.GPU and not (device is not None and is_device_cpu(device))


def should_use_bf16(
    device: torch.device | None = None,
    model_params: float = 0,
    prioritize_performance: bool = True,
    manual_cast: bool = False,
) -> bool:
    return cpu_state is CPUState.GPU and not (device is not None and is_device_cpu(device))


def supports_nvfp4_compute(device: torch.device | None = None) -> bool:
    return False


def supports_fp8_compute(device: torch.device | None = None) -> bool:
    return cpu_state is CPUState.GPU


def dtype_size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def unet_dtype(
    device: torch.device | None = None,
    model_params: float = 0,
    supported_dtypes: list[torch.dtype] = [torch.float16, torch.bfloat16, torch.float32],  # noqa: B006
    weight_dtype: torch.dtype | None = None,
) -> torch.dtype:
    if weight_dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and supports_fp8_compute(device):
        return weight_dtype
    for dtype in supported_dtypes:
        if dtype is torch.float16 and should_use_fp16(device):
            return dtype
        if dtype is torch.bfloat16 and should_use_bf16(device):
            return dtype
    return torch.float32


def unet_manual_cast(
    weight_dtype: torch.dtype | None,
    inference_device: torch.device,
    supported_dtypes: list[torch.dtype] = [torch.float16, torch.bfloat16, torch.float32],  # noqa: B006
) -> torch.dtype | None:
    """The dtype to compute in, None where it is the one that weights are kept in."""
    if weight_dtype in (torch.float32, torch.float64):
        return None
    half = weight_dtype is torch.float16 and should_use_fp16(inference_device)
    if half or (weight_dtype is torch.bfloat16 and should_use_bf16(inference_device)):
        return None
    return unet_dtype(inference_device, 0, supported_dtypes)


def unet_offload_device() -> torch.device:
    return get_torch_device() if vram_state is VRAMState.HIGH_VRAM else CPU


def unet_inital_load_device(parameters: float, dtype: torch.dtype) -> torch.device:
    if memory_management.aimdo_enabled:
        return CPU
    device = get_torch_device()
    if vram_state in (VRAMState.HIGH_VRAM, VRAMState.SHARED):
        return device
    fits = dtype_size(dtype) * parameters < get_free_memory(device)
    return device if get_free_memory(device) > get_free_memory(CPU) and fits else CPU


def text_encoder_offload_device() -> torch.device:
    return CPU


def text_encoder_device() -> torch.device:
    wanted = vram_state in (VRAMState.HIGH_VRAM, VRAMState.NORMAL_VRAM) or memory_management.aimdo_enabled
    return get_torch_device() if wanted else CPU


def text_encoder_initial_device(load_device: torch.device, offload_device: torch.device, model_size: float = 0) -> torch.device:
    """Straight onto the card when the encoder fits with room to spare and the card is not small beside RAM."""
    if memory_management.aimdo_enabled or load_device == offload_device or model_size <= GIB:
        return offload_device
    free_there, free_here = get_free_memory(load_device), get_free_memory(offload_device)
    return load_device if free_there > free_here * 0.5 and model_size * 1.2 < free_there else offload_device


def text_encoder_dtype(device: torch.device | None = None) -> torch.dtype:
    return torch.float16


def vae_device() -> torch.device:
    return get_torch_device()


def vae_offload_device() -> torch.device:
    return CPU


def vae_dtype(
    device: torch.device | None = None,
    allowed_dtypes: list[torch.dtype] = [],  # noqa: B006
) -> torch.dtype:
    for dtype in allowed_dtypes:
        if dtype is torch.float16 and should_use_fp16(device):
            return dtype
        if dtype is torch.bfloat16 and should_use_bf16(device):
            return dtype
    return torch.float32


def intermediate_device() -> torch.device:
    return CPU


def intermediate_dtype() -> torch.dtype:
    return torch.float32


def extra_reserved_memory() -> float:
    return EXTRA_RESERVED_VRAM


def minimum_inference_memory() -> float:
    return 0.8 * GIB + extra_reserved_memory()


# What is loaded.


class LoadedModel:
    """One patcher on a device. Holds it weakly; when a clone dies, its parent takes its place."""

    def __init__(self, model: "ModelPatcher") -> None:
        self._patcher_finalizer: weakref.finalize[..., Any] | None = None
        self._set_model(model)
        self.device = model.load_device
        self.real_model: weakref.ref[Any] | None = None
        self.currently_used = True
        self.model_finalizer: weakref.finalize[..., Any] | None = None

    def _set_model(self, model: "ModelPatcher") -> None:
        self._model = weakref.ref(model)
        self._parent_model = None if model.parent is None else weakref.ref(model.parent)
        if self._parent_model is not None:
            self._patcher_finalizer = weakref.finalize(model, self._switch_parent)
            self._patcher_finalizer.atexit = False

    def _switch_parent(self) -> None:
        parent = self._parent_model() if self._parent_model else None
        if parent is not None:
            self._set_model(parent)
            self.device = parent.load_device

    @property
    def model(self) -> Any:
        return self._model()

    def model_memory(self) -> int:
        return self.model.model_size()

    def model_loaded_memory(self) -> int:
        return self.model.loaded_size()

    def model_offloaded_memory(self) -> int:
        return self.model.model_size() - self.model.loaded_size()

    def model_memory_required(self, device: torch.device) -> int:
        there = device == self.model.current_loaded_device()
        return self.model_offloaded_memory() if there else self.model_memory()

    def model_load(self, lowvram_model_memory: float = 0, force_patch_weights: bool = False) -> Any:
        self.model_use_more_vram(lowvram_model_memory or 1e32, force_patch_weights=force_patch_weights)
        real_model = self.model.model
        self.real_model = weakref.ref(real_model)
        self.model_finalizer = weakref.finalize(real_model, cleanup_models)
        self.model_finalizer.atexit = False
        return real_model

    def model_unload(self, memory_to_free: float | None = None, unpatch_weights: bool = True) -> bool:
        """False: enough was freed by unloading a part of it, and it stays in the list."""
        if memory_to_free is not None and memory_to_free < self.model.loaded_size():
            freed = self.model.partially_unload(self.model.offload_device, memory_to_free)
            if freed >= memory_to_free:
                return False
        self.model.detach(unpatch_weights)
        if self.model_finalizer is not None:
            self.model_finalizer.detach()
        self.model_finalizer = None
        self.real_model = None
        return True

    def model_use_more_vram(self, extra_memory: float, force_patch_weights: bool = False) -> float:
        return self.model.partially_load(self.device, extra_memory, force_patch_weights=force_patch_weights)

    def is_dead(self) -> bool:
        """The patcher is gone while its weights are still held by somebody."""
        return self.real_model is not None and self.real_model() is not None and self.model is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedModel) and self.model is other.model

    def __del__(self) -> None:
        if self._patcher_finalizer is not None:
            self._patcher_finalizer.detach()


current_loaded_models: list[LoadedModel] = []


def loaded_models(only_currently_used: bool = False) -> list[Any]:
    return [entry.model for entry in current_loaded_models if entry.currently_used or not only_currently_used]


def cleanup_models() -> None:
    for entry in list(current_loaded_models):
        if entry.real_model is None or entry.real_model() is None:
            current_loaded_models.remove(entry)


def cleanup_models_gc() -> None:
    dead = [entry for entry in current_loaded_models if entry.is_dead()]
    if dead:
        logging.info("Potential memory leak detected with a model, doing a full garbage collect.")
        gc.collect()


def discard_cuda_async_error() -> None: ...


def soft_empty_cache(force: bool = False) -> None:
    """Nothing to give back: the simulated card has no allocator that keeps freed blocks."""


def free_memory(
    memory_required: float,
    device: torch.device | None,
    keep_loaded: list[LoadedModel] = [],  # noqa: B006
    for_dynamic: bool = False,
    pins_required: float = 0,
    ram_required: float = 0,
) -> list[LoadedModel]:
    """Unload until so much is free: models already offloaded in part first, then the least referenced, then the smallest.

    For the sake of dynamic models no dynamic one is unloaded: their pages give way by themselves (0.33, line 884).
    """
    cleanup_models_gc()
    candidates = []
    for index in reversed(range(len(current_loaded_models))):
        entry = current_loaded_models[index]
        if (device is None or entry.device == device) and entry not in keep_loaded and not entry.is_dead():
            order = (-entry.model_offloaded_memory(), sys.getrefcount(entry.model), entry.model_memory(), index)
            candidates.append(order)
            entry.currently_used = False
    unloaded = []
    for *_, index in sorted(candidates):
        to_free = 0 if device is None else memory_required - get_free_memory(device)
        entry = current_loaded_models[index]
        if entry.model.is_dynamic() and for_dynamic:
            memory_required -= entry.model.loaded_size()
            to_free = 0
        if to_free > 0:
            name, before = entry.model.model.__class__.__name__, entry.model_loaded_memory()
            gone = entry.model_unload(to_free)
            after = 0 if gone else entry.model_loaded_memory()
            journal.note("unload", model=name, freed_bytes=before - after, entirely=gone)
            if gone:
                unloaded.append(index)
    return [current_loaded_models.pop(index) for index in sorted(unloaded, reverse=True)]


def load_models_gpu(
    models: list[Any],
    memory_required: float = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: float | None = None,
    force_full_load: bool = False,
) -> None:
    """Make room for the weights and the work ahead, then load as much of each model as the budget allows."""
    cleanup_models_gc()
    inference_memory = minimum_inference_memory()
    extra_memory = max(inference_memory, memory_required + extra_reserved_memory())
    if minimum_memory_required is None:
        minimum_memory_required = extra_memory
    else:
        minimum_memory_required = max(inference_memory, minimum_memory_required + extra_reserved_memory())

    entries = [_entry_for(model) for model in reversed(list(dict.fromkeys(models)))]
    for entry in entries:
        _drop_entries_of_clones(entry)
    needed: dict[torch.device, float] = {}
    for entry in entries:
        needed[entry.device] = needed.get(entry.device, 0) + entry.model_memory_required(entry.device)
    on_accelerator = [device for device in needed if device != CPU]
    all_dynamic = all(model.is_dynamic() for model in models)
    for device in on_accelerator:
        free_memory(needed[device] * 1.1 + extra_memory, device, for_dynamic=all_dynamic)
    for device in on_accelerator:
        if get_free_memory(device) < minimum_memory_required:
            free_memory(minimum_memory_required, device, for_dynamic=all_dynamic)
    for entry in entries:
        budget = 0.0 if force_full_load else _weight_budget(entry, minimum_memory_required)
        entry.model_load(budget, force_patch_weights=force_patch_weights)
        current_loaded_models.insert(0, entry)
        journal.note(
            "load",
            model=entry.model.model.__class__.__name__,
            bytes=entry.model_memory(),
            bytes_on_card=entry.model_loaded_memory() if on_card(entry.device) else 0,
        )


def _entry_for(model: Any) -> LoadedModel:
    fresh = LoadedModel(model)
    for entry in current_loaded_models:
        if entry == fresh:
            entry.currently_used = True
            return entry
    logging.info("Requested to load %s", model.model.__class__.__name__)
    return fresh


def _drop_entries_of_clones(entry: LoadedModel) -> None:
    """The weights may already be there under another clone's name; they stay there, the name goes."""
    for other in [known for known in current_loaded_models if entry.model.is_clone(known.model)]:
        del current_loaded_models[next(i for i, known in enumerate(current_loaded_models) if known is other)]
        other.model.detach(unpatch_all=False)
        if other.model_finalizer is not None:
            other.model_finalizer.detach()


def _weight_budget(entry: LoadedModel, minimum_memory_required: float) -> float:
    """More bytes of weights this model may put on the card; 0 means all of it."""
    if is_device_cpu(entry.device) or vram_state not in (VRAMState.LOW_VRAM, VRAMState.NORMAL_VRAM):
        return 0.1 if vram_state is VRAMState.NO_VRAM else 0.0
    loaded = entry.model_loaded_memory()
    free = get_free_memory(entry.device) + loaded
    floor = min(free * MIN_WEIGHT_MEMORY_RATIO, free - minimum_inference_memory())
    budget = max(0, free - minimum_memory_required, floor) - loaded
    return budget or 0.1


def load_model_gpu(model: Any) -> None:
    load_models_gpu([model])


def unload_all_models() -> None:
    for device in get_all_torch_devices():
        free_memory(1e30, device)


# Streams and their buffers, copies in pinned RAM: DynamicVRAM's.

STREAM_AIMDO_CAST_BUFFERS: dict[int, VRAMBuffer] = {}
DEFAULT_AIMDO_CAST_BUFFER_RESERVATION_SIZE = 16 * GIB
TOTAL_PINNED_MEMORY = 0
_stream_turns = itertools.count()


def get_offload_stream(device: torch.device) -> int:
    """The streams take turns. (A number here.)"""
    return next(_stream_turns) % NUM_STREAMS


def get_aimdo_cast_buffer(offload_stream: int, device: torch.device) -> VRAMBuffer:
    buffer = STREAM_AIMDO_CAST_BUFFERS.get(offload_stream)
    if buffer is None:
        buffer = VRAMBuffer(DEFAULT_AIMDO_CAST_BUFFER_RESERVATION_SIZE, device.index)
        STREAM_AIMDO_CAST_BUFFERS[offload_stream] = buffer
    return buffer


def reset_cast_buffers() -> None:
    """After every node: the buffers go, and no dynamic model counts as being worked with (0.33, line 1418)."""
    for entry in current_loaded_models:
        if entry.model is not None and entry.model.is_dynamic():
            entry.model.model.dynamic_pins[entry.model.load_device]["active"] = False
    STREAM_AIMDO_CAST_BUFFERS.clear()


def ensure_pin_budget(size: int, evict_active: bool = False, loaded: bool = False) -> bool:
    """Copies are made while 2 GiB of RAM stay available (0.33, line 710). The real one drops other models' copies first."""
    return RAM_BYTES - TOTAL_PINNED_MEMORY - size >= 2 * GIB


# The switch that ends a run.

_interrupt_lock = threading.RLock()
_interrupted = False


def interrupt_current_processing(value: bool = True) -> None:
    global _interrupted
    with _interrupt_lock:
        _interrupted = value
    if value:
        holds.interrupted()


def processing_interrupted() -> bool:
    with _interrupt_lock:
        return _interrupted


def throw_exception_if_processing_interrupted() -> None:
    global _interrupted
    with _interrupt_lock:
        if _interrupted:
            _interrupted = False
            raise InterruptProcessingException()


def debug_memory_summary() -> str:
    the_card = card()
    if the_card is None:
        return ""
    return f"{the_card.name}: {the_card.used_bytes} of {the_card.total_bytes} bytes used, {list(the_card.bookings)}"
