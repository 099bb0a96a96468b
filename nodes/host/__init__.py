"""The only package that imports ComfyUI. `connect()` gives the rest of the pack a frozen set of parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ...vram.selfcheck import Checker
from .backend import read_backend
from .decoding import HostDecoder
from .detection import HostDetector
from .encoders import HostEncoders
from .execution import HostExecution
from .files import HostFiles
from .media import HostMedia
from .models import HostModels
from .node_cache import HostNodeCache
from .pages import dynamic_vram_is_on
from .placement import HostPlacement
from .sampling import HostSampling
from .seams import SeamTable, seams_switched_off
from .selfcheck import host_selfcheck
from .server import HostServer
from .uses import HostUses
from .worker import WorkerQueue

logger = logging.getLogger("vram_headroom")


@dataclass(frozen=True, slots=True)
class Host:
    """The running ComfyUI, as far as this pack is concerned."""

    models: HostModels
    files: HostFiles
    media: HostMedia
    detector: HostDetector
    decoder: HostDecoder
    checker: Checker
    server: HostServer
    execution: HostExecution
    worker: WorkerQueue
    placement: HostPlacement
    uses: HostUses
    sampling: HostSampling
    encoders: HostEncoders
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
    node_cache = HostNodeCache(seams, execution)
    worker = WorkerQueue(seams, execution.wake)
    worker.at_idle(node_cache.tidy)
    placement = HostPlacement(seams)
    uses = HostUses(seams, execution, placement)
    checker = host_selfcheck(lambda: execution.running is not None)
    models = HostModels(seams, lambda: execution.running, lambda: checker.look().vouched(read_backend()), uses=uses)
    if dynamic_vram_is_on():
        execution.at_boundary(models.publish)
    execution.at_boundary(worker.drain)
    return Host(
        models=models,
        files=HostFiles(seams),
        media=HostMedia(),
        detector=HostDetector(),
        decoder=HostDecoder(seams),
        checker=checker,
        server=server,
        execution=execution,
        worker=worker,
        placement=placement,
        uses=uses,
        sampling=HostSampling(seams),
        encoders=HostEncoders(seams),
        node_cache=node_cache,
        seams=seams,
    )
