"""The only package that imports ComfyUI. `connect()` gives the rest of the pack a frozen set of parts."""

from __future__ import annotations

from dataclasses import dataclass

from .execution import HostExecution
from .files import HostFiles
from .models import HostModels
from .seams import SeamTable, seams_switched_off
from .server import HostServer


@dataclass(frozen=True, slots=True)
class Host:
    """The running ComfyUI, as far as this pack is concerned."""

    models: HostModels
    files: HostFiles
    server: HostServer
    execution: HostExecution
    seams: SeamTable


def connect() -> Host:
    """Take hold of the running ComfyUI. What it lacks is noted in the seam table, never raised."""
    seams = SeamTable(off=seams_switched_off())
    execution = HostExecution(seams)
    models = HostModels(seams, lambda: execution.running)
    execution.at_boundary(models.publish)
    return Host(models, HostFiles(), HostServer(seams), execution, seams)
