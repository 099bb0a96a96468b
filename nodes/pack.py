"""The parts of the running pack, put together once: host, monitor, offloader."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from ..vram.monitor import VRAMMonitor
from ..vram.offloader import VRAMOffloader
from ..vram.plan.graph import build_chain
from ..vram.plan.prompt import class_types
from ..vram.plan.types import Card, Plan
from ..vram.status import Status, read_status
from .host import Host

VERSION = "0.1.0"

PATIENCE_S: Final = 2.0
"""A prompt waits this long for its plan, which takes milliseconds (tests/bench_plan.py)."""


@dataclass(frozen=True, slots=True)
class Pack:
    """What every node, route and hook of this pack works with."""

    host: Host
    monitor: VRAMMonitor
    offloader: VRAMOffloader
    planner: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="vram_headroom_plan"))
    """One thread, started by the first plan: one that hangs on a dead network drive holds up no other work of the server."""

    def status(self) -> Status:
        models = self.host.models
        return read_status(
            version=VERSION,
            monitor=self.monitor,
            offloader=self.offloader,
            loaded_models=models.report(lambda key: self.offloader.pipeline_of(key) is not None),
            running=self.host.execution.running,
            rules=models.rules(),
            seams=self.host.seams.report(),
        )

    async def plan_in_time(self, prompt: object, targets: Iterable[str] | None = None) -> Plan:
        """`plan` on a thread of its own. Raises TimeoutError when it takes longer than PATIENCE_S; the thread then goes on."""
        work = asyncio.get_running_loop().run_in_executor(self.planner, self.plan, prompt, targets)
        return await asyncio.wait_for(work, PATIENCE_S)

    def plan(self, prompt: object, targets: Iterable[str] | None = None) -> Plan:
        """Plan an API-format prompt on the first card as it is now. Raises PromptError when it is none."""
        rules = self.host.models.rules()
        held = self.host.models.held()
        # elastic pages lie outside torch's allocator, so they are no part of what it calls active
        weights = sum(model.bytes_on_card for model in held if not model.elastic)
        running_beside = weights if self.host.execution.running else None
        chain = build_chain(
            prompt=prompt,
            vocabulary=self.host.models.vocabulary(class_types(prompt)),
            library=self.host.files.header,
            rules=rules,
            card=self.monitor.card() or Card("no accelerator", 0, 0),
            targets=targets,
        )
        return self.monitor.plan_chain(chain, rules, held, running_beside=running_beside)
