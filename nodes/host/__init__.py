"""The only package that imports ComfyUI. `connect()` gives the rest of the pack a frozen set of parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ...vram.selfcheck import Checker
from .backend import read_backend
from .detection import HostDetector
from .execution import HostExecution
from .files import HostFiles
from .media import HostMedia
from .models import HostModels
from .node_cache import HostNodeCache
from .seams import SeamTable, seams_switched_off
from .selfcheck import host_selfcheck
from .server import HostServer

logger = logging.getLogger("vram_headroom")


@dataclass(frozen=True, slots=True)
class Host:
    """The running ComfyUI, as far as this pack is concerned."""

    models: HostModels
    files: HostFiles
    media: HostMedia
    detector: HostDetector
    checker: Checker
    server: HostServer
    execution: HostExecution
    node_cache: HostNodeCache
    seams: SeamTable


def connect(folder: str) -> Host | None:
    """Take hold of the running ComfyUI for the copy of the pack in `folder`; None if another copy has it.

    What this ComfyUI lacks is noted in the seam table, never raised.
    """
    seams = SeamTable(off=seams_switched_off())
    server = HostServer(seams)
    other = server.claim(folder)
    if other is not None:
        logger.warning("VRAM Headroom is installed twice: %s is used, remove %s", other, folder)
        return None
    execution = HostExecution(seams)
    checker = host_selfcheck(lambda: execution.running is not None)
    models = HostModels(seams, lambda: execution.running, lambda: checker.look().vouched(read_backend()))
    execution.at_boundary(models.publish)
    return Host(models, HostFiles(), HostMedia(), HostDetector(), checker, server, execution, HostNodeCache(seams), seams)
