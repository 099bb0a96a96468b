"""The one simulated card of this process, made by the engine's own device module, loaded by path under a private name."""

import importlib
import importlib.util
import sys
from functools import cache
from typing import TYPE_CHECKING

import torch

from . import settings
from .pages import CardPages

if TYPE_CHECKING:
    from vram.device import Booking, SimulatedCard

GIB = 2**30
CPU = torch.device("cpu")
# Differs from plain `cpu`, as a GPU would, while its tensors stay in CPU memory.
CARD_DEVICE = torch.device("cpu", 0)


@cache
def card() -> "SimulatedCard | None":
    """None where the stand-in plays a machine without a GPU."""
    configured = settings.current()
    if configured.vram_bytes == 0:
        return None
    folder = configured.pack_root / "vram"
    spec = importlib.util.spec_from_file_location(
        "_standin_engine", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no engine in {folder}")
    sys.modules["_standin_engine"] = importlib.util.module_from_spec(spec)
    device = importlib.import_module("_standin_engine.device")
    name = f"Simulated {configured.vram_bytes / GIB:g} GB"
    return device.SimulatedCard(configured.vram_bytes, configured.others_bytes, name=name)


@cache
def pages() -> CardPages | None:
    """comfy-aimdo's books on that card; None where the stand-in plays a ComfyUI without DynamicVRAM."""
    the_card = card()
    return CardPages(the_card) if settings.current().dynamic and the_card is not None else None


def memory() -> "SimulatedCard | CardPages | None":
    """What torch allocates from: the card, or with DynamicVRAM comfy-aimdo's hooks before it."""
    return pages() or card()


def on_card(device: torch.device | None) -> bool:
    return card() is not None and device == CARD_DEVICE


class Booked:
    """Bytes on the card for as long as the block runs: activations of one forward."""

    def __init__(self, nbytes: float, owner: str, device: torch.device) -> None:
        self._nbytes, self._owner, self._device = int(nbytes), owner, device
        self._booking: Booking | None = None

    def __enter__(self) -> "Booked":
        torch_memory = memory()
        if torch_memory is not None and on_card(self._device) and self._nbytes > 0:
            self._booking = torch_memory.allocate(self._nbytes, self._owner)
        return self

    def __exit__(self, *_: object) -> None:
        torch_memory = memory()
        if torch_memory is not None and self._booking is not None:
            torch_memory.release(self._booking)
            self._booking = None
