"""How much memory a forward needs: it is run on the `meta` device and every storage it makes is counted until it is freed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kernel = Literal["flash", "math", "native"]
"""Scaled-dot-product attention. `flash`: the output, laid out as the flash kernel lays it out, and the log-sum-exp in fp32,
[batch, heads, queries]. `math`: torch's own chain, which makes the whole matrix of scores. `native`: what torch does on the
device of the trace; on `meta` that is `math`."""

Workspace = Literal["none", "copies"]
"""Scratch memory of a convolution: none, or a copy of its input and of its output, as cuDNN takes for a change of layout. The
two are the bracket: published readings of VAE peaks lie at one end or the other (an RTX 4090 in fp16 at the upper, bf16 at the
lower)."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Which kernels the forward is taken to run with."""

    attention: Kernel = "flash"
    fused_rms_norm: bool = True
    """One kernel that makes its output only (torch 2.9 and newer on a GPU), or the chain that torch falls back to."""
    convolution_workspace: Workspace = "none"
    instead: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Operations by name (`library::apply_rope1`) and what runs in their place, counted operation by operation: how a custom
    operation that has a kernel on a GPU is traced as the chain it is without one. Operations that are not named make what
    their outputs need."""
    device: str = "meta"
    """Storages on other devices are not counted. On a device that computes, the fakes of `attention="flash"` and
    `fused_rms_norm` are empty tensors: the memory is right, the numbers are not."""


class AllocEvent(NamedTuple):
    """One storage made (`bytes` > 0) or freed (`bytes` < 0)."""

    block: int
    """The same for the making and the freeing of a storage, never used again."""
    bytes: int
    op: str
    shape: tuple[int, ...]
    dtype: str


class Alive(NamedTuple):
    """One storage that is alive at the peak, and what made it."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward allocates, in bytes. Weights, inputs and whatever else was there before are not in it."""

    peak_bytes: int
    """The most that was alive at once."""
    output_bytes: int
    """What of that the returned value holds."""
    kept_bytes: int
    """What is still alive when the returned value is gone: caches that the forward leaves on its module."""
    events: tuple[AllocEvent, ...]
    peak_event: int
    """Index of the event that makes the peak; -1 without events."""

    def at_peak(self) -> tuple[Alive, ...]:
        """What is alive at the peak, oldest first."""
        alive: dict[int, Alive] = {}
        for event in self.events[: self.peak_event + 1]:
            if event.bytes > 0:
                alive[event.block] = Alive(event.op, event.shape, event.dtype, event.bytes)
            else:
                alive.pop(event.block, None)
        return tuple(alive.values())

    def peak_by_op(self) -> tuple[tuple[str, int], ...]:
        """Operations and the bytes they have alive at the peak, most first."""
        by_op: Counter[str] = Counter()
        for alive in self.at_peak():
            by_op[alive.op] += alive.bytes
        return tuple(by_op.most_common())

    def requests(self) -> Iterator[tuple[int, int]]:
        """The events as (block, bytes): what an allocator is asked for."""
        return ((event.block, event.bytes) for event in self.events)


def trace_forward(forward: Callable[[], object], *, options: TraceOptions | None = None) -> Trace:
    """Runs `forward` and counts what it allocates on the device of the options, in this thread only.

    Views, aliases and in-place operations add nothing; a storage counts from the operation that makes it until nothing refers
    to it any more. What exists before (parameters, inputs, anything that `forward` closes over) is not counted, so an input
    that shall be counted has to be made inside. Bytes are those of the storages: an allocator rounds them up. What a kernel
    uses inside itself is not seen, except for `convolution_workspace`.

    Gradients are off. Raises what `forward` raises, with no mode left active. Attention and RMSNorm are recognised where
    `torch.nn.functional` or `torch` is called for them, not inside a composite such as `torch.nn.MultiheadAttention`.
    """
    ledger = _Ledger()
    chosen = options or TraceOptions()
    try:
        # In inference mode composite operations reach a dispatch mode whole: what they make inside would not be seen.
        with torch.inference_mode(False), torch.no_grad(), _Allocations(ledger, chosen), _Kernels(ledger, chosen):
            result = forward()
        output_bytes = ledger.bytes_of(result)
        del result
        return ledger.close(output_bytes)
    finally:
        ledger.closed = True


class _Ledger:
    """Storages that were made during the trace, and the events in their order."""

    def __init__(self) -> None:
        self.events: list[AllocEvent] = []
        self.closed = False
        self._ours: dict[int, tuple[int, int, weakref.ref[Any]]] = {}
        self._before: dict[int, weakref.ref[Any]] = {}
        self._next = 0

    def saw_argument(self, tensor: torch.Tensor) -> None:
        """A storage that an operation is given and none made was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._ours and key not in self._before:
            self._before[key] = weakref.ref(storage, lambda _: self._before.pop(key, None))

    def saw_result(self, tensor: torch.Tensor, op: str) -> None:
        """A storage that nothing is known about was made by this operation; one that was resized is another one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._before:
            return
        nbytes = storage.nbytes()
        known = self._ours.get(key)
        if known is not None:
            block, before, _ = known
            if before == nbytes:
                return
            self._record_free(block, before)
        block = self._record_make(nbytes, op, tensor)
        self._ours[key] = (block, nbytes, weakref.ref(storage, lambda _: self._freed(key, block)))

    def scratch(self, nbytes: int, op: str, tensor: torch.Tensor) -> None:
        """Memory that an operation uses inside itself, beside its result."""
        self._record_free(self._record_make(nbytes, op, tensor), nbytes)

    def bytes_of(self, value: object) -> int:
        """Bytes of the storages made here that the tensors in `value` refer to."""
        keys = {leaf.untyped_storage()._cdata for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}
        return sum(self._ours[key][1] for key in keys if key in self._ours)

    def close(self, output_bytes: int) -> Trace:
        kept = sum(nbytes for _, nbytes, _ in self._ours.values())
        now = peak = 0
        peak_event = -1
        for index, event in enumerate(self.events):
            now += event.bytes
            if now > peak:
                peak, peak_event = now, index
        return Trace(peak, output_bytes, kept, tuple(self.events), peak_event)

    def _record_make(self, nbytes: int, op: str, tensor: torch.Tensor) -> int:
        block = self._next
        self._next += 1
        if nbytes:
            self.events.append(AllocEvent(block, nbytes, op, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
        return block

    def _record_free(self, block: int, nbytes: int) -> None:
        if nbytes:
            self.events.append(AllocEvent(block, -nbytes, "free", (), ""))

    def _freed(self, key: int, block: int) -> None:
        known = self._ours.get(key)
        if not self.closed and known is not None and known[0] == block:
            del self._ours[key]
            self._record_free(block, known[1])


class _Allocations(TorchDispatchMode):
    """Sees every operation that reaches a kernel, and the storages of what it is given and what it returns."""

    def __init__(self, ledger: _Ledger, options: TraceOptions) -> None:
        super().__init__()
        self._ledger = ledger
        self._options = options
        self._device = torch.device(options.device).type
        self._known = _KnownResults()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(_has_own_dispatch(kind) for kind in types):
            return NotImplemented  # a wrapper such as a quantised tensor: its own operations come back here one by one
        name = func._schema.name
        given = kwargs or {}
        chain = self._options.instead.get(name)
        if chain is not None:
            with self:
                return chain(*args, **given)
        if name not in _LIFTS:
            for tensor in self._counted((args, given)):
                self._ledger.saw_argument(tensor)
        result = self._known.call(func, args, given) if self._device == "meta" else func(*args, **given)
        for tensor in self._counted(result):
            self._ledger.saw_result(tensor, name)
        if name == "aten::convolution" and self._options.convolution_workspace == "copies":
            self._scratch_of_convolution(args[0], result)
        return result

    def _scratch_of_convolution(self, given: torch.Tensor, made: torch.Tensor) -> None:
        if given.device.type == self._device:
            nbytes = given.numel() * given.element_size() + made.numel() * made.element_size()
            self._ledger.scratch(nbytes, "convolution workspace", made)

    def _counted(self, value: object) -> Iterator[torch.Tensor]:
        return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device)


class _KnownResults:
    """Shapes of results on `meta`, by operation and shapes of arguments: torch works each out in Python, in about 0.3 ms, and a
    forward repeats its blocks and frames."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def call(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """What `func` returns, or a new storage of the same shape and strides where that is known."""
        schema = func._schema
        if schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].alias_info is not None:
            return func(*args, **given)
        try:
            key = (func, _signature(args), _signature(given))
            known = self._found.get(key)
        except TypeError:  # an argument that can't be compared
            return func(*args, **given)
        if known is not None:
            shape, strides, dtype = known
            return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        result = func(*args, **given)
        if _is_new(result, (args, given)):
            self._found[key] = (result.shape, result.stride(), result.dtype)
        return result


def _signature(value: object) -> object:
    """Equal for what gives results of equal shape. Of a number its value may decide, and its type does (1, 1.0 and True)."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device.type)
    if isinstance(value, (list, tuple)):
        return tuple(_signature(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _signature(part)) for name, part in value.items())
    return (value.__class__, value)


def _is_new(result: object, given: object) -> bool:
    """A plain tensor on `meta` with a storage of its own that holds it and nothing else."""
    if result.__class__ is not torch.Tensor or not isinstance(result, torch.Tensor) or result.device.type != "meta":
        return False
    storage = result.untyped_storage()
    last = sum((count - 1) * step for count, step in zip(result.shape, result.stride(), strict=True))
    same = (last + 1) * result.element_size() if result.numel() else 0
    others = (leaf.untyped_storage()._cdata for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
    return storage.nbytes() == same and storage._cdata not in others


class _Kernels(TorchFunctionMode):
    """Puts what a kernel of a GPU would make in the place of what torch does without one."""

    def __init__(self, ledger: _Ledger, options: TraceOptions) -> None:
        super().__init__()
        self._ledger = ledger
        self._options = options

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention and self._options.attention != "native":
            return (_flash if self._options.attention == "flash" else _math)(*args, **given)
        if func in _RMS_NORMS and self._options.fused_rms_norm:
            return torch.empty_like(args[0] if args else given["input"])
        result = func(*args, **given)
        if func in _CONSTRUCTORS and result.device.type == torch.device(self._options.device).type:
            self._ledger.saw_result(result, "torch::tensor")
        return result


_RMS_NORMS: Final = (functional.rms_norm, torch.rms_norm)
_CONSTRUCTORS: Final = (torch.tensor,)
"""Makes a storage on `meta` without an operation that a dispatch mode sees (torch 2.13)."""
_LIFTS: Final = ("aten::lift_fresh", "aten::lift")
"""How a tensor that was made of Python numbers enters: its storage is new although it is an argument."""


def _has_own_dispatch(kind: type) -> bool:
    own = getattr(kind, "__torch_dispatch__", None)
    return own is not None and own is not torch._C._disabled_torch_dispatch_impl


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """[..., heads, queries, width] as a view of [..., queries, heads, width]: torch transposes the result of flash, efficient
    and cuDNN attention (aten/src/ATen/native/transformers/cuda/attention.cu), so that joining the heads copies nothing."""
    *batch, heads, queries, _ = query.shape
    log_sum_exp = query.new_empty((*batch, heads, queries), dtype=torch.float32)
    made = query.new_empty((*batch, queries, heads, value.shape[-1]))
    del log_sum_exp
    return made.transpose(-2, -3)


def _math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, *args, **kwargs)[0]
