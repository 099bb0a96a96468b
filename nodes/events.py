"""What is pushed to browsers that watch: status, plan, phase and recovery events, over ComfyUI's own websocket.

A browser watches by a heartbeat. While one does, a thread looks twice a second and tells each what it does not know yet; while
none does there is neither thread nor timer, and no node of any prompt pays for this.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Final

from ..vram.brief import BriefThread
from ..vram.incidents import Incident
from ..vram.plan.types import Plan
from ..vram.run_record import RunSeen
from ..vram.status import StatusReport, status_report
from .changes import differs
from .host.execution import PromptSpan
from .lifecycle import Lifecycle
from .pack import Pack
from .run_report import PhaseReport, Place, PlanReport, RecoveryReport, RunAnswer, RunReport, RunReports

logger = logging.getLogger("vram_headroom")

STATUS_EVENT: Final = "vram_headroom.status"
PLAN_EVENT: Final = "vram_headroom.plan"
PHASE_EVENT: Final = "vram_headroom.phase"
RECOVERY_EVENT: Final = "vram_headroom.recovery"

EventData = PlanReport | PhaseReport | RecoveryReport | StatusReport

INTERVAL_S: Final = 0.5
"""Between two events of one kind: a person reads numbers that change no faster."""

FORGOTTEN_S: Final = 30.0
"""A browser that has not been heard of for so long is gone: three heartbeats."""

MOST_WATCHERS: Final = 64
"""Pages of one server that are told at once; of more, those that were heard of last."""


@dataclass(slots=True)
class Watcher:
    """A browser, and what it has been told. None: nothing yet, or something that may not be what it shows."""

    client_id: str
    heard_at: float
    status: StatusReport | None
    prompt_id: str | None = None
    taken: int = 0
    """Samples of that prompt's run."""
    place: Place | None = None
    phase_at: float = float("-inf")
    plan: Plan | None = None
    plan_told: bool = False
    plan_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a browser is told that begins to watch, or goes on."""

    status: StatusReport
    run: RunReport | None


class Events:
    """Tells watchers. Any thread."""

    def __init__(
        self,
        pack: Pack,
        lifecycle: Lifecycle,
        clock: Callable[[], float] | None = None,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
        thread: Executor | None = None,
    ) -> None:
        """`clock` counts seconds, `wait(event, seconds)` waits between two looks, `thread` runs them; a test replaces them."""
        self._pack = pack
        self._clock = clock or pack.monitor.now
        self._wait = wait
        self._thread = thread or BriefThread("vram_headroom_events")
        self._record = lifecycle.record
        self._reports = RunReports(pack, lifecycle)
        self._lock = threading.Lock()
        self._watchers: dict[str, Watcher] = {}
        self._follows = False
        self._wake = threading.Event()
        self._looked_at = float("-inf")
        self._incidents: deque[Incident] = deque()
        self._planning: tuple[str, Future[Plan]] | None = None
        self._span: PromptSpan | None = None
        self._record.on_change(self.changed)
        pack.incidents.watch(self._recovered)
        pack.host.execution.watch(self)

    # who watches

    def watch(self, client_id: str) -> Answer:
        """A heartbeat of this browser: it is told from now on, for FORGOTTEN_S seconds."""
        status, seen = status_report(self._pack.status()), self._record.seen()
        run = self._reports.run(seen) if seen is not None else None
        now = self._clock()
        with self._lock:
            watcher = self._watchers.pop(client_id, None) or self._beginner(client_id, status, run)
            watcher.heard_at = now
            # what it shows by now is this answer, and the next event is to be what differs from that
            if watcher.status is not None and differs(watcher.status, status):
                watcher.status = None
            if run is not None and watcher.place != run.place:
                watcher.place = None
            self._watchers[client_id] = watcher
            for client in list(self._watchers)[: max(0, len(self._watchers) - MOST_WATCHERS)]:
                del self._watchers[client]
            if not self._follows:
                self._looked_at = now
                self._follows = self._begin()
        return Answer(status, None if run is None else run.report)

    def _begin(self) -> bool:
        try:
            self._thread.submit(self._follow)
        except RuntimeError:
            # the browser goes on asking, and its next heartbeat tries again
            logger.exception("the system gives no thread to tell the panel what changes")
            return False
        return True

    def leave(self, client_id: str) -> None:
        """This browser looks no longer."""
        with self._lock:
            self._watchers.pop(client_id, None)
        self.changed()

    def watching(self) -> tuple[str, ...]:
        """The clients that are told, those heard of last at the end."""
        return tuple(watcher.client_id for watcher in self._living())

    def changed(self) -> None:
        """Something is worth a look at once. Costs nothing while nobody watches."""
        if self._follows:
            self._wake.set()

    def _beginner(self, client_id: str, status: StatusReport, run: RunAnswer | None) -> Watcher:
        watcher = Watcher(client_id, 0.0, status)
        if run is not None:
            watcher.prompt_id, watcher.taken, watcher.place = run.report["prompt_id"], run.taken, run.place
            watcher.plan, watcher.plan_told = run.plan, run.plan is not None or run.place.state != "running"
        return watcher

    def _living(self) -> list[Watcher]:
        now = self._clock()
        with self._lock:
            for watcher in [one for one in self._watchers.values() if now - one.heard_at > FORGOTTEN_S]:
                del self._watchers[watcher.client_id]
            return list(self._watchers.values())

    # the prompt that runs

    def prompt_started(self, span: PromptSpan) -> None:
        self._span = span

    def prompt_ended(self, span: PromptSpan) -> None: ...

    def _recovered(self, incident: Incident) -> None:
        if self._follows:
            self._incidents.append(incident)
            self._wake.set()

    # telling

    def _follow(self) -> None:
        try:
            while True:
                with self._lock:
                    now = self._clock()
                    if not any(now - watcher.heard_at <= FORGOTTEN_S for watcher in self._watchers.values()):
                        self._watchers.clear()
                        self._incidents.clear()
                        self._follows = False
                        return
                self._wake.clear()
                self.tell()
                self._wait(self._wake, min(INTERVAL_S, max(0.01, self._looked_at + INTERVAL_S - self._clock())))
        except Exception:
            # the browser goes back to asking, and its next heartbeat begins anew
            logger.exception("the panel can't be told what changes")
            with self._lock:
                self._watchers.clear()
                self._follows = False

    def tell(self) -> None:
        """Tell every watcher what it does not know, as far as it is time for that."""
        now = self._clock()
        watchers = self._living()
        if not watchers:
            return
        while self._incidents:
            incident = self._incidents.popleft()
            self._send(watchers, RECOVERY_EVENT, self._reports.recovery(incident, self._record.seen()))
        seen = self._record.seen()
        if seen is not None:
            for watcher in watchers:
                self._tell_run(watcher, seen, now)
        if now - self._looked_at >= INTERVAL_S:
            self._looked_at = now
            status = status_report(self._pack.status())
            for watcher in watchers:
                if watcher.status is None or differs(watcher.status, status):
                    watcher.status = status
                    self._send((watcher,), STATUS_EVENT, status)

    def _tell_run(self, watcher: Watcher, run: RunSeen, now: float) -> None:
        if watcher.prompt_id != run.prompt_id:
            if not self._told_its_end(watcher, now):
                return
            watcher.prompt_id, watcher.taken, watcher.place, watcher.plan_told = run.prompt_id, 0, None, False
        plan, decided = self._plan(run)
        untold = not watcher.plan_told or watcher.plan is not plan
        if untold and decided and now - watcher.plan_at >= INTERVAL_S:
            watcher.plan, watcher.plan_told, watcher.plan_at = plan, True, now
            self._send((watcher,), PLAN_EVENT, PlanReport(prompt_id=run.prompt_id, plan=self._reports.plan(plan)))
        self._tell_phase(watcher, run, now)

    def _told_its_end(self, watcher: Watcher, now: float) -> bool:
        """Whether it knows how the run ended that it knows of: another prompt may have started at once."""
        before = self._record.before()
        if before is None or before.prompt_id != watcher.prompt_id or (watcher.place and watcher.place.state == before.state):
            return True
        return self._tell_phase(watcher, before, now)

    def _tell_phase(self, watcher: Watcher, run: RunSeen, now: float) -> bool:
        """False where it is too early."""
        if now - watcher.phase_at < INTERVAL_S:
            return False
        report, place = self._reports.phase(run, watcher.taken)
        if place != watcher.place or report["samples"]:
            watcher.place, watcher.phase_at, watcher.taken = place, now, run.taken
            self._send((watcher,), PHASE_EVENT, report)
        return True

    def _send(self, watchers: Iterable[Watcher], event: str, data: EventData) -> None:
        for watcher in watchers:
            self._pack.host.server.send(event, data, watcher.client_id)

    def _plan(self, run: RunSeen) -> tuple[Plan | None, bool]:
        """The newest plan of this run; False as long as it is being made. A prompt that was queued unchecked is planned now."""
        plan = self._reports.plan_of(run)
        if plan is not None or run.state != "running":
            return plan, True
        span = self._span
        if self._planning is None or self._planning[0] != run.prompt_id:
            if span is None or span.prompt_id != run.prompt_id:
                return None, False
            self._planning = run.prompt_id, self._pack.planner.submit(self._pack.plan_now, span.prompt, span.outputs)
            self._planning[1].add_done_callback(lambda _: self.changed())
        made = self._planning[1]
        if not made.done():
            return None, False
        if made.exception() is not None:
            return None, True
        self._pack.plans.put(run.prompt_id, made.result())
        return made.result(), True
