"""The handle a model comes with: the only way this pack looks at it or moves it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch

Placement = Literal["gpu", "cpu", "partial"]


class ModelHandle(Protocol):
    """One model, seen through whoever places it. Shaped on ComfyUI's patchers.

    Looking moves and allocates nothing and waits for no move. A move that fails raises what made it fail and leaves the
    model whole and usable where it was; it is then as if it had not been asked for.
    """

    @property
    def key(self) -> object:
        """Equal for two handles of one model, however many clones of it there are."""
        ...

    @property
    def alive(self) -> bool:
        """False once the model itself is gone."""
        ...

    @property
    def in_use(self) -> bool:
        """Its host computes with it right now."""
        ...

    @property
    def elastic(self) -> bool:
        """Its weights come and go by themselves (DynamicVRAM): no threshold evicts it."""
        ...

    @property
    def device_index(self) -> int:
        """The card it is placed on when it is."""
        ...

    def total_bytes(self) -> int:
        """Bytes of the whole model on the card."""
        ...

    def bytes_on_card(self) -> int: ...

    def load(self) -> int:
        """Bring the model to the card, as much of it as its host would. Returns the bytes that moved."""
        ...

    def unload(self, nbytes: int | None = None) -> int:
        """Free `nbytes` of the card or more, or all of the model. Returns the bytes freed."""
        ...


def placement_of(total_bytes: int, bytes_on_card: int) -> Placement:
    return "cpu" if bytes_on_card == 0 else "gpu" if bytes_on_card >= total_bytes else "partial"


class TensorMover(Protocol):
    """Moves one tensor. A test replaces it by one that books what it moves on a simulated card."""

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """`tensor` on `device`. The given one stays whole until `drop`."""
        ...

    def drop(self, tensor: torch.Tensor) -> None:
        """This copy is not needed any more."""
        ...

    def is_on(self, tensor: torch.Tensor, device: torch.device) -> bool: ...


class PlainMover:
    """`Tensor.to`, blocking."""

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.to(device)

    def drop(self, tensor: torch.Tensor) -> None:
        pass

    def is_on(self, tensor: torch.Tensor, device: torch.device) -> bool:
        # "cuda" names the current card, whatever its number
        return tensor.device.type == device.type and device.index in (None, tensor.device.index)


class TorchModuleHandle:
    """A plain torch module: all of it is on the card or all of it is on the CPU.

    A part of a module can't compute without the rest, so `unload(nbytes)` frees all of it. A module kept alive by nothing but
    this handle is a leak, so it is held: whoever registers it unregisters it.
    """

    in_use = False
    elastic = False

    def __init__(
        self,
        module: torch.nn.Module,
        device: torch.device,
        home: torch.device | None = None,
        mover: TensorMover | None = None,
    ) -> None:
        self._module = module
        self._device = device
        self._home = home or torch.device("cpu")
        self._mover: TensorMover = mover or PlainMover()

    @property
    def key(self) -> int:
        return id(self._module)

    @property
    def alive(self) -> bool:
        return True

    @property
    def device_index(self) -> int:
        return self._device.index or 0

    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def bytes_on_card(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors() if self._mover.is_on(tensor.data, self._device))

    def load(self) -> int:
        return self._move(self._device)

    def unload(self, nbytes: int | None = None) -> int:
        return self._move(self._home) if nbytes is None or nbytes > 0 else 0

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._module.parameters()
        yield from self._module.buffers()

    def _move(self, device: torch.device) -> int:
        """Every tensor to `device`, or none: what has moved already goes back when one fails."""
        moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for tensor in self._tensors():
                if not self._mover.is_on(tensor.data, device):
                    original = tensor.data
                    tensor.data = self._mover.move(original, device)
                    moved.append((tensor, original))
        except BaseException:
            for tensor, original in reversed(moved):
                copy, tensor.data = tensor.data, original
                self._mover.drop(copy)
            raise
        for _, original in moved:
            self._mover.drop(original)
        return sum(original.nbytes for _, original in moved)
