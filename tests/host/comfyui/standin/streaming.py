"""A dynamic model's layers: staged with DynamicVRAM's addresses, brought into pages one by one as a forward comes to them.

ComfyUI 0.33: comfy/ops.py, cast_modules_with_vbar and resolve_cast_module_with_vbar; comfy/pinned_memory.py. WAN's models name
no blocks to fetch ahead (`get_dynamic_vram__units`), so a layer is brought when its turn comes and let go after it.

Not simulated: patches' own copies, casts to another type, the second turn of streams that the largest layer of all causes,
and copies in RAM that are dropped for other models'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.model_management as model_management
from comfy_aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_signature_compare, vbar_unpin

if TYPE_CHECKING:
    from .models import Module, StandInModel

FORCED_UP_TO = 16 * 1024
"""Modules up to so many bytes are put on the card when the model is loaded, outside of the pages: model_patcher.py:1967."""
SMALL_BELOW = 64 * 1024
"""Of those with pages, the ones below come first, then all from the largest down: model_patcher.py:973-976."""


class Layer:
    """One module that has addresses in its model's pages."""

    def __init__(self, module: Module, alloc: tuple[ModelVBAR, int, int]) -> None:
        self.name = module.name
        self.nbytes = module.aligned_bytes
        self.alloc = alloc
        self.signature: Any = None
        """Of its pages when its bytes were last copied there; None: they are not."""
        self.ram: str | None = None
        """Which kind of copy in pinned RAM it has: `weights` (it was streamed) or `weights-loaded` (it had a page)."""


class Staged:
    """What one dynamic model has staged, and what its forwards moved so far."""

    def __init__(self, model: StandInModel, vbar: ModelVBAR) -> None:
        modules = model.file.modules
        self.forced_bytes = sum(module.nbytes for module in modules if module.nbytes <= FORCED_UP_TO)
        by_importance = sorted(
            (module for module in modules if module.nbytes > FORCED_UP_TO),
            key=lambda module: (module.nbytes >= SMALL_BELOW, -module.nbytes, module.name),
        )
        self.layers = [Layer(module, vbar.alloc(module.aligned_bytes)) for module in by_importance]
        turns = {module.name: number for number, module in enumerate(modules)}
        self.in_turn = sorted(self.layers, key=lambda layer: turns[layer.name])
        self.read_from_file = 0
        self.copied_from_ram = 0
        self.streamed = 0
        """Of both, what went past the pages, through a buffer."""
        self._copies: dict[str, list[Layer]] = {"weights": [], "weights-loaded": []}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ram_bytes(self) -> int:
        """Of copies in pinned RAM."""
        return sum(layer.nbytes for copies in self._copies.values() for layer in copies)

    def forget_contents(self) -> None:
        """Other patches: whatever the pages hold is no longer right (model_patcher.py:1914)."""
        for layer in self.layers:
            layer.signature = None

    def bring(self, layer: Layer) -> bool:
        """Have one layer's bytes on the card; True: in its pages, which are pinned now."""
        signature = vbar_fault(layer.alloc)
        if vbar_signature_compare(signature, layer.signature):
            return True
        if signature is None:
            device = model_management.get_torch_device()
            stream = model_management.get_offload_stream(device)
            model_management.get_aimdo_cast_buffer(stream, device).get(layer.nbytes)
            self.streamed += layer.nbytes
        if layer.ram is not None:
            self.copied_from_ram += layer.nbytes
        else:
            self.read_from_file += layer.nbytes
            self._keep_copy(layer, "weights" if signature is None else "weights-loaded")
        layer.signature = signature
        return signature is not None

    def _keep_copy(self, layer: Layer, subset: str) -> None:
        if model_management.ensure_pin_budget(layer.nbytes, loaded=subset.endswith("-loaded")):
            layer.ram = subset
            self._copies[subset].append(layer)
            model_management.TOTAL_PINNED_MEMORY += layer.nbytes

    def drop_copies(self, nbytes: float, subsets: list[str]) -> int:
        """The copies made last go first, until so many bytes are gone."""
        gone = 0
        for subset in subsets:
            copies = self._copies.get(subset, [])
            while copies and gone < nbytes:
                layer = copies.pop()
                layer.ram = None
                gone += layer.nbytes
        model_management.TOTAL_PINNED_MEMORY -= gone
        return gone


@contextmanager
def forward(patcher: Any, uses: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Bring each layer of a dynamic model that `uses` names, in turn; inside of the block the last one is still pinned.

    A legacy model's weights are where its load put them: nothing happens. Raises what the library raises: RuntimeError where
    a layer finds no room, as a page or in a buffer.
    """
    staged: Staged | None = patcher.model.staged if patcher.is_dynamic() else None
    pinned: Layer | None = None
    try:
        for layer in [] if staged is None else staged.in_turn:
            if staged is not None and uses(layer.name):
                if pinned is not None:
                    vbar_unpin(pinned.alloc)
                    pinned = None
                pinned = layer if staged.bring(layer) else None
        yield
    finally:
        if pinned is not None:
            vbar_unpin(pinned.alloc)
