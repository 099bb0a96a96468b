"""The parts of the running pack, put together once: host, monitor, offloader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Final

from aiohttp import web

from ..vram.brief import BriefThread
from ..vram.components import ComponentRole
from ..vram.device import DeviceReadError
from ..vram.incidents import IncidentLog
from ..vram.monitor import NoAcceleratorError, VRAMMonitor
from ..vram.offloader import VRAMOffloader
from ..vram.plan.advice import Context, FixReport, advise, fix_report
from ..vram.plan.cache import Bounded, ChainCache, PlanStore, Reads, content_key
from ..vram.plan.graph import build_chain
from ..vram.plan.placing import Key
from ..vram.plan.planner import make_plan
from ..vram.plan.prompt import PromptError, class_types
from ..vram.plan.ram import SystemMemory
from ..vram.plan.rerun import Kept, unchanged
from ..vram.plan.sizing import Sizing
from ..vram.plan.types import Card, Chain, Earlier, HeldModel, HostRules, Plan
from ..vram.policy import chosen_policy
from ..vram.selfcheck import report
from ..vram.status import Status, WaitingAction, read_status
from ..vram.system_memory import held_by_process, read_system_memory
from ..vram.units import GIB
from .host import Host
from .host.server import QueuedPrompt

VERSION = "0.1.0"

PATIENCE_S: Final = 2.0
"""A prompt waits this long for its plan, which takes milliseconds (tests/bench_plan.py)."""


MARGIN_SETTING: Final = "VRAMHeadroom.SafetyMarginGB"
"""The setting in ComfyUI's settings dialog (web/settings.js)."""

MOST_MARGIN_GB: Final = 64

ANSWERS_KEPT: Final = 32

MEMORY_GRAIN: Final = 1 << 28
"""System memory changes all the time, and an answer does not for less than this."""

NO_CARD: Final = Card("no accelerator", 0, 0)

REPLACEMENTS: Final = ("VAEDecodeTiled", "UnetLoaderGGUF", "CLIPLoaderGGUF")
"""Node classes that a fix may put in another's place."""


MOST_QUEUED: Final = 3
"""Different prompts that are replayed before the one that is planned, and before each fix that is tried: the last ones decide
what the card will hold."""

ROLES: Final = {
    "generator": ComponentRole.GENERATOR,
    "text_encoder": ComponentRole.TEXT_ENCODER,
    "vae": ComponentRole.VAE,
    "clip_vision": ComponentRole.CLIP_VISION,
}


@dataclass(frozen=True, slots=True)
class Moment:
    """Everything a plan depends on beside the prompt, read once: plans made from it can be compared."""

    pack: Pack
    rules: HostRules
    held: tuple[HeldModel, ...]
    card: Card | None
    memory: SystemMemory | None
    targets: tuple[str, ...] | None
    before: tuple[Earlier, ...] = ()
    """What the prompts that run first have still to do."""
    queue: tuple[tuple[str, str | None], ...] = ()
    """Their ids, and the node that runs."""
    kept: Kept | None = None
    """What the host has of its last run, where nothing else runs before this prompt."""

    @property
    def other_programs(self) -> int:
        """Bytes of the card that neither this process's models nor anybody has."""
        if self.card is None:
            return 0
        return max(0, self.card.total - self.card.free - sum(model.bytes_on_card for model in self.held))

    def key(self, prompt: object) -> str:
        """Equal where the same answer is right: system memory is told to a quarter of a GB."""
        memory = self.memory and (self.memory.room // MEMORY_GRAIN, self.memory.swap_free // MEMORY_GRAIN)
        return content_key(prompt, self.targets, self.rules, self.card, self.held, memory, self.queue)

    def plan(self, prompt: object) -> Plan:
        """Raises PromptError when `prompt` is none."""
        return self._planned(prompt, self.pack.chain(prompt, self.rules, self.card, self.targets, self.kept))

    def try_out(self, prompt: object) -> Plan:
        """As `plan`, for one of many that nobody will ask for again: nothing of it is kept."""
        return self._planned(prompt, self.pack.build(prompt, self.rules, self.card or NO_CARD, self.targets, None, self.kept))

    def _planned(self, prompt: object, chain: Chain) -> Plan:
        pinned = _ruled(prompt, chain, "pin_to_gpu")
        return make_plan(chain, self.card, self.rules, self.held, self.memory, pinned, self.before)


@dataclass(slots=True)
class Pack:
    """What every node, route and hook of this pack works with."""

    host: Host
    monitor: VRAMMonitor
    offloader: VRAMOffloader
    planner: Executor = field(default_factory=lambda: BriefThread("vram_headroom_plan"))
    """One thread while something is planned: one that hangs on a dead network drive holds up no other work of the server."""
    plans: PlanStore = field(default_factory=PlanStore)
    """By the id of the prompt that was queued with it."""
    answers: Bounded[tuple[Chain, Plan, list[FixReport]]] = field(default_factory=lambda: Bounded(ANSWERS_KEPT))
    """What was answered for a prompt and a state of the card."""
    incidents: IncidentLog = field(default_factory=IncidentLog)
    """What came of out-of-memory errors."""
    waiting: Callable[[], tuple[WaitingAction, ...]] = tuple
    """What was asked of models and waits for the worker thread (actions.py)."""
    chains: ChainCache = field(init=False)
    sizing: Sizing = field(init=False)

    def __post_init__(self) -> None:
        self.chains = ChainCache(self.host.files.path)
        self.sizing = Sizing(self.host.detector.detect)

    def status(self) -> Status:
        models = self.host.models
        return read_status(
            version=VERSION,
            monitor=self.monitor,
            offloader=self.offloader,
            loaded_models=models.report(self.offloader.pipeline_of),
            running=self.host.execution.running,
            rules=models.rules(),
            seams=self.host.seams.report(),
            self_check=report(self.host.checker.look()),
            waiting=self.waiting(),
            memory=read_system_memory(),
            memory_ours=held_by_process(),
        )

    def other_programs(self) -> int:
        """Bytes of the first card that nobody here can free; 0 where that can't be told."""
        try:
            return self.monitor.snapshot().others or 0
        except (NoAcceleratorError, DeviceReadError):
            return 0

    def margin(self, request: web.Request) -> int | None:
        """Bytes that the user who asks wants left free on the card; None where nothing was chosen."""
        chosen = self.host.server.setting(request, MARGIN_SETTING)
        if isinstance(chosen, bool) or not isinstance(chosen, (int, float)) or not 0 <= chosen <= MOST_MARGIN_GB:
            return None
        return round(chosen * GIB)

    async def plan_in_time(
        self, prompt: object, targets: Iterable[str] | None = None, margin: int | None = None, front: bool = False
    ) -> Plan:
        """`plan` on a thread of its own. Raises TimeoutError when it takes longer than PATIENCE_S; the thread then goes on."""
        work = asyncio.get_running_loop().run_in_executor(self.planner, self.plan, prompt, targets, margin, front)
        return await asyncio.wait_for(work, PATIENCE_S)

    async def check_in_time(
        self, prompt: object, targets: Iterable[str] | None = None, margin: int | None = None
    ) -> tuple[Plan, list[FixReport]]:
        """`plan` with what would make it fit, as `plan_in_time`."""
        work = asyncio.get_running_loop().run_in_executor(self.planner, self.check, prompt, targets, margin)
        return await asyncio.wait_for(work, PATIENCE_S)

    def plan(
        self, prompt: object, targets: Iterable[str] | None = None, margin: int | None = None, front: bool = False
    ) -> Plan:
        """Plan an API-format prompt on the first card, as it will be when the prompts that run and wait are done; one that goes
        to the `front` of the queue comes after the running one. Raises PromptError when it is none."""
        moment = self._moment(targets, margin, front=front)
        known = self._answered(moment, prompt)
        return moment.plan(prompt) if known is None else known[1]

    def plan_now(self, prompt: object, targets: Iterable[str] | None = None) -> Plan:
        """Plan a prompt that starts this moment, whatever else waits. Raises PromptError when it is none."""
        return self._moment(targets, None, starts=True).plan(prompt)

    def check(
        self, prompt: object, targets: Iterable[str] | None = None, margin: int | None = None
    ) -> tuple[Plan, list[FixReport]]:
        """A plan and the fixes for it, all planned against the card as it is at one moment. Raises PromptError."""
        moment = self._moment(targets, margin)
        known = self._answered(moment, prompt)
        if known is not None:
            return known[1], known[2]
        plan, fixes = self._advised(prompt, moment)
        chain = self.chain(prompt, moment.rules, moment.card, moment.targets, moment.kept)
        self.answers.put(moment.key(prompt), (chain, plan, fixes))
        return plan, fixes

    def _answered(self, moment: Moment, prompt: object) -> tuple[Chain, Plan, list[FixReport]] | None:
        """The answer given before to the same question, unless a file it looked at has changed since. Raises PromptError."""
        chain = self.chain(prompt, moment.rules, moment.card, moment.targets, moment.kept)
        known = self.answers.get(moment.key(prompt))
        return known if known is not None and known[0] is chain else None

    def _advised(self, prompt: object, moment: Moment) -> tuple[Plan, list[FixReport]]:
        plan = moment.plan(prompt)
        if not isinstance(prompt, dict):
            return plan, []
        vocabulary = {**self.host.models.vocabulary({*class_types(prompt), *REPLACEMENTS})}
        context = Context(
            vocabulary=vocabulary,
            targets=moment.targets,
            library=self.host.files.header,
            files=self.host.files.names,
            rules=moment.rules,
            replan_with=lambda rules: replace(moment, rules=rules).try_out(prompt),
            replan_on=lambda card: replace(moment, card=card).try_out(prompt),
            other_programs=moment.other_programs,
        )
        return plan, [fix_report(prompt, fix) for fix in advise(prompt, plan, moment.try_out, context)]

    def _moment(self, targets: Iterable[str] | None, margin: int | None, starts: bool = False, front: bool = False) -> Moment:
        rules = self.host.models.rules()
        held = self.host.models.held(self.offloader.pinned_keys())
        weights = sum(model.bytes_on_card for model in held if self.host.models.counts_pages or not model.elastic)
        card = self.monitor.card(running_beside=weights if self.host.execution.running else None)
        if card is not None and margin is not None:
            card = replace(card, safety_margin=margin)
        queue = () if starts else tuple(item for item in self.host.server.queued() if item.running or not front)
        running = self.host.execution.running
        return Moment(
            pack=self,
            rules=rules,
            held=held,
            card=card,
            memory=read_system_memory(),
            targets=None if targets is None else tuple(targets),
            before=self._before(queue, rules, card),
            kept=None if queue else self.host.node_cache.kept(),
            queue=tuple((item.prompt_id, running.node_id if running and item.running else None) for item in queue),
        )

    def _before(self, queue: tuple[QueuedPrompt, ...], rules: HostRules, card: Card | None) -> tuple[Earlier, ...]:
        """The last of them, in their order. One that was queued many times, each with another seed, counts once."""
        found: list[Earlier] = []
        for item in reversed(queue):
            earlier = self._earlier(item, rules, card)
            if earlier is not None and earlier not in found:
                found.append(earlier)
            if len(found) == MOST_QUEUED:
                break
        return tuple(reversed(found))

    def _earlier(self, item: QueuedPrompt, rules: HostRules, card: Card | None) -> Earlier | None:
        """What is left to do of a prompt that runs or waits; None for one that can't be planned."""
        try:
            chain = self.chain(item.prompt, rules, card, item.outputs or None)
        except PromptError:
            return None
        running = self.host.execution.running
        if item.running and running is not None:
            nodes = [phase.node_id for phase in chain.phases]
            if running.node_id in nodes:
                chain = replace(chain, phases=chain.phases[nodes.index(running.node_id) :])
        leaves, pinned = (_ruled(item.prompt, chain, rule) for rule in ("offload_between_uses", "pin_to_gpu"))
        return Earlier(chain, leaves, pinned)

    def chain(
        self,
        prompt: object,
        rules: HostRules,
        card: Card | None,
        targets: tuple[str, ...] | None,
        kept: Kept | None = None,
    ) -> Chain:
        """The graph's chain, built anew only where it or a file it names is not what it was."""
        card = card or NO_CARD
        # of the card only its size decides anything in a chain: whether plain fp8 stays fp8
        try:
            key = content_key(prompt, targets, rules, card.total, kept.stamp if kept else None)
        except ValueError as error:
            raise PromptError(str(error)) from None
        known = self.chains.get(key)
        if known is not None:
            return known
        reads = Reads(self.host.files.header, self.host.media.size, self.host.media.path)
        chain = self.build(prompt, rules, card, targets, reads, kept)
        self.chains.put(key, chain, reads)
        return chain

    def build(
        self,
        prompt: object,
        rules: HostRules,
        card: Card,
        targets: tuple[str, ...] | None,
        reads: Reads | None = None,
        kept: Kept | None = None,
    ) -> Chain:
        """A new chain. `reads` notes what is looked at; nodes that are as they were in what is `kept` are left out."""
        reads = reads or Reads(self.host.files.header, self.host.media.size, self.host.media.path)
        return build_chain(
            prompt=prompt,
            vocabulary=self.host.models.vocabulary(class_types(prompt)),
            library=reads.header,
            rules=rules,
            card=card,
            targets=targets,
            media=reads.size,
            sizing=self.sizing,
            cached=unchanged(prompt, kept),
        )


def _ruled(prompt: object, chain: Chain, rule: str) -> frozenset[Key]:
    """Models of `chain` that a policy node of its graph rules so (`pin_to_gpu`, `offload_between_uses`)."""
    roles = {model.key: ROLES.get(model.role, ComponentRole.OTHER) for model in chain.models}
    last = dict(chain.ruled)
    return frozenset(key for key, node_id in last.items() if key in roles and _says(prompt, node_id, roles[key], rule))


def _says(prompt: object, node_id: str, role: ComponentRole, rule: str) -> bool:
    node = prompt.get(node_id) if isinstance(prompt, dict) else None
    inputs = node.get("inputs") if isinstance(node, dict) else None
    chosen = inputs.get("policy") if isinstance(inputs, dict) else None
    policy = chosen_policy(chosen, role) if isinstance(chosen, str) else None
    return bool(policy is not None and getattr(policy, rule))
